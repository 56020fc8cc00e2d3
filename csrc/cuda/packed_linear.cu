#include "forward.cuh"

namespace bitkernels::cuda {

int64_t packed_linear_workspace(const PackedLinear& p) {
  return forward_workspace<SignF16>(p.x, p.M, p.N, p.K, p.dtype, p.axis == ScaleAxis::kColumn);
}

// Column scales belong to the activations; row and single scales to the output.
void packed_linear(const PackedLinear& p, Executor stream) {
  const float* alpha = static_cast<const float*>(p.alpha);
  const float* beta = static_cast<const float*>(p.beta);
  const bool column = p.axis == ScaleAxis::kColumn;
  TokenSource source{p.x, nullptr, nullptr, 1, true, p.dtype, p.M, p.K};
  Epilogue epilogue{nullptr, nullptr, p.axis == ScaleAxis::kRow ? 1 : 0, static_cast<const float*>(p.bias), p.y,
                    p.dtype, p.N};
  (column ? source.scale : epilogue.scale) = alpha;
  (column ? source.shift : epilogue.shift) = beta;
  run_forward<SignF16>(source, p.w_packed, epilogue, p.workspace, stream);
}

}  // namespace bitkernels::cuda
