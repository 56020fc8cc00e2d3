#include "backward.cuh"

namespace bitkernels::cuda {

int64_t ternary_linear_backward_workspace(const TernaryLinearBackward& p) {
  return prepared_bytes<TernaryColumns::Gradient>(p.M, p.N, p.dtype);
}

void ternary_linear_backward(const TernaryLinearBackward& p, Executor stream) {
  const TokenSource source{p.grad, nullptr, nullptr, 0, false, p.dtype, p.M, p.N};
  const Epilogue epilogue{static_cast<const float*>(p.scale), nullptr, 0, nullptr, p.dx, p.dtype, p.K};
  run_backward<TernaryColumns>(source, p.w_packed, epilogue, {}, p.workspace, stream);
}

}  // namespace bitkernels::cuda
