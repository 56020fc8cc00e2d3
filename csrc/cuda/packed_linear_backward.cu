#include "add_rows.cuh"
#include "backward.cuh"
#include "transpose.cuh"
#include "warpgroup_forward.cuh"

namespace bitkernels::cuda {
namespace {

// Every warp of tokens leaves partial sums of dalpha and dbeta behind the prepared dy.
ScaleGradients partial_gradients(const PackedLinearBackward& p, const Prepared& dy) {
  if (!p.dalpha) return {};
  float* partial = reinterpret_cast<float*>(static_cast<char*>(p.workspace) +
                                            prepared_bytes<SignColumns::Gradient>(p.M, p.N, p.dtype));
  return {p.x, partial, partial + gradient_rows(dy) * p.K};
}

// Without sums over tokens, dx is the forward matmul with the transposed weights: scales of columns become scales
// of rows.
bool by_transposition(const PackedLinearBackward& p) {
  return !p.dalpha && warpgroup_applies(p.dtype, p.N, p.axis == ScaleAxis::kRow);
}

void run_by_transposition(const PackedLinearBackward& p, cudaStream_t stream) {
  uint32_t* transposed = static_cast<uint32_t*>(p.workspace);
  transpose_packed<1>(p.w_packed, transposed, p.N, p.K, stream);
  const float* alpha = static_cast<const float*>(p.alpha);
  const float* beta = static_cast<const float*>(p.beta);
  const bool of_summed = p.axis == ScaleAxis::kRow;
  TokenSource source{p.grad, nullptr, nullptr, 1, true, p.dtype, p.M, p.N};
  Epilogue epilogue{nullptr, nullptr, p.axis == ScaleAxis::kColumn ? 1 : 0, nullptr, p.dx, p.dtype, p.K};
  (of_summed ? source.scale : epilogue.scale) = alpha;
  (of_summed ? source.shift : epilogue.shift) = beta;
  run_warpgroup_forward<SignF16>(source, weights(transposed, p.K, transposed_words<1>(p.N)), epilogue,
                                 static_cast<char*>(p.workspace) + transposed_bytes<1>(p.N, p.K), stream);
}

}  // namespace

int64_t packed_linear_backward_workspace(const PackedLinearBackward& p) {
  if (by_transposition(p)) {
    return transposed_bytes<1>(p.N, p.K) +
           warpgroup_workspace<SignF16>(p.grad, {p.dtype, p.axis == ScaleAxis::kRow, p.M, p.K, p.N});
  }
  const Prepared dy = prepared<SignColumns::Gradient>(p.M, p.N, p.dtype, nullptr);
  const int64_t partial = p.dalpha ? 2 * gradient_rows(dy) * p.K * sizeof(float) : 0;
  return prepared_bytes<SignColumns::Gradient>(p.M, p.N, p.dtype) + partial;
}

// Row and single scales belong to the summed index, so they scale dy; column scales belong to dx.
void packed_linear_backward(const PackedLinearBackward& p, Executor stream) {
  if (by_transposition(p)) return run_by_transposition(p, stream);
  const float* alpha = static_cast<const float*>(p.alpha);
  const float* beta = static_cast<const float*>(p.beta);
  const bool column = p.axis == ScaleAxis::kColumn;
  TokenSource source{p.grad, nullptr, nullptr, p.axis == ScaleAxis::kRow ? 1 : 0, true, p.dtype, p.M, p.N};
  Epilogue epilogue{nullptr, nullptr, 1, nullptr, p.dx, p.dtype, p.K};
  (column ? epilogue.scale : source.scale) = alpha;
  (column ? epilogue.shift : source.shift) = beta;
  const Prepared dy = prepared<SignColumns::Gradient>(p.M, p.N, p.dtype, p.workspace);
  const ScaleGradients partial = partial_gradients(p, dy);
  run_backward<SignColumns>(source, p.w_packed, epilogue, partial, p.workspace, stream);
  if (!p.dalpha) return;
  add_rows(partial.dalpha, partial.dbeta, gradient_rows(dy), p.K, static_cast<float*>(p.dalpha),
           static_cast<float*>(p.dbeta), stream);
}

}  // namespace bitkernels::cuda
