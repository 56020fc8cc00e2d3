#include "backward.cuh"
#include "transpose.cuh"
#include "warpgroup_forward.cuh"

namespace bitkernels::cuda {

int64_t ternary_linear_backward_workspace(const TernaryLinearBackward& p) {
  if (warpgroup_applies(p.dtype, p.N, false)) {
    return transposed_bytes<2>(p.N, p.K) + warpgroup_workspace<TernaryF16>(p.grad, {p.dtype, false, p.M, p.K, p.N});
  }
  return prepared_bytes<TernaryColumns::Gradient>(p.M, p.N, p.dtype);
}

void ternary_linear_backward(const TernaryLinearBackward& p, Executor stream) {
  const TokenSource source{p.grad, nullptr, nullptr, 0, false, p.dtype, p.M, p.N};
  const Epilogue epilogue{static_cast<const float*>(p.scale), nullptr, 0, nullptr, p.dx, p.dtype, p.K};
  if (warpgroup_applies(p.dtype, p.N, false)) {
    uint32_t* transposed = static_cast<uint32_t*>(p.workspace);
    transpose_packed<2>(p.w_packed, transposed, p.N, p.K, stream);
    return run_warpgroup_forward<TernaryF16>(source, weights(transposed, p.K, transposed_words<2>(p.N)), epilogue,
                                             static_cast<char*>(p.workspace) + transposed_bytes<2>(p.N, p.K), stream);
  }
  run_backward<TernaryColumns>(source, p.w_packed, epilogue, {}, p.workspace, stream);
}

}  // namespace bitkernels::cuda
