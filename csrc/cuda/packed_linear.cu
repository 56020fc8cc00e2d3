#include "explain.cuh"
#include "packed_linear.h"

namespace bitkernels::cuda {
namespace {

// Column scales belong to the activations; row and single scales to the output.
TokenSource source_of(const PackedLinear& p) {
  const bool column = p.axis == ScaleAxis::kColumn;
  return {p.x,
          column ? static_cast<const float*>(p.alpha) : nullptr,
          column ? static_cast<const float*>(p.beta) : nullptr,
          1,
          true,
          p.dtype,
          p.M,
          p.K};
}

Epilogue epilogue_of(const PackedLinear& p) {
  Epilogue epilogue{nullptr, nullptr, p.axis == ScaleAxis::kRow ? 1 : 0, static_cast<const float*>(p.bias), p.y,
                    p.dtype, p.N};
  if (p.axis != ScaleAxis::kColumn) {
    epilogue.scale = static_cast<const float*>(p.alpha);
    epilogue.shift = static_cast<const float*>(p.beta);
  }
  return epilogue;
}

Weights weights_of(const PackedLinear& p) { return weights(p.w_packed, p.N, ceil_div(p.K, kSignsPerWord)); }

}  // namespace

int64_t packed_linear_workspace(const PackedLinear& p) {
  return forward_workspace<SignF16>(p.x, p.M, p.N, p.K, p.dtype, p.axis == ScaleAxis::kColumn);
}

void packed_linear(const PackedLinear& p, Executor stream) {
  run_forward<SignF16>(source_of(p), p.w_packed, epilogue_of(p), p.workspace, stream);
}

bool normed_packed_linear(const PackedLinear& p, const void* x, DType x_dtype, const float* norm_weight, float eps,
                          Executor stream) {
  const TokenSource source = source_of(p);
  const Weights w = weights_of(p);
  if (!takes_pairs<SignF16>(source, w)) return false;
  const auto run = [&](auto t) {
    using T = decltype(t);
    const auto form = x_dtype == DType::kFloat32 ? run_pairs<float, T> : run_pairs<T, T>;
    form(x, norm_weight, eps, source, w, epilogue_of(p), p.workspace, stream);
  };
  p.dtype == DType::kBFloat16 ? run(bf16()) : run(fp16());
  return true;
}

std::string explain(const PackedLinear& p) { return explain_forward<SignF16>(source_of(p), weights_of(p)); }

}  // namespace bitkernels::cuda
