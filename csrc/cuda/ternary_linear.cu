#include "explain.cuh"

namespace bitkernels::cuda {
namespace {

TokenSource source_of(const TernaryLinear& p) { return {p.x, nullptr, nullptr, 0, false, p.dtype, p.M, p.K}; }

Weights weights_of(const TernaryLinear& p) { return weights(p.w_packed, p.N, ceil_div(p.K, kTernaryPerWord)); }

}  // namespace

int64_t ternary_linear_workspace(const TernaryLinear& p) {
  return p.int8_activations ? forward_workspace<TernaryI8>(p.x, p.M, p.N, p.K, p.dtype, false)
                            : forward_workspace<TernaryF16>(p.x, p.M, p.N, p.K, p.dtype, false);
}

void ternary_linear(const TernaryLinear& p, Executor stream) {
  const Epilogue epilogue{
      static_cast<const float*>(p.scale), nullptr, 0, static_cast<const float*>(p.bias), p.y, p.dtype, p.N};
  if (p.int8_activations) {
    run_forward<TernaryI8>(source_of(p), p.w_packed, epilogue, p.workspace, stream);
  } else {
    run_forward<TernaryF16>(source_of(p), p.w_packed, epilogue, p.workspace, stream);
  }
}

std::string explain(const TernaryLinear& p) {
  return p.int8_activations ? explain_forward<TernaryI8>(source_of(p), weights_of(p))
                            : explain_forward<TernaryF16>(source_of(p), weights_of(p));
}

}  // namespace bitkernels::cuda
