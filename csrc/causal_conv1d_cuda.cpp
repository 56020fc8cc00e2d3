// causal_conv1d on CUDA: checks, allocation, dispatch.
#include "cuda/causal_conv1d_cuda.h"

#include "cuda_operators.h"
#include "mixer.h"

namespace bitkernels {
namespace {

// Of a type that kernels read.
Tensor narrow(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? torch::stable::to(t, ScalarType::Float) : t;
}

std::optional<Tensor> dense_or_none(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return dense(*t);
}

DType dtype_of(const char* op, const char* argument, const std::optional<Tensor>& t) {
  return t ? kernel_dtype(op, argument, t->scalar_type()) : DType::kFloat32;
}

bool is_wide(const std::optional<Tensor>& t) { return t && t->scalar_type() == ScalarType::Long; }

}  // namespace

Tensor causal_conv1d_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& initial_state, const std::optional<Tensor>& seq_idx,
                          const std::optional<Tensor>& cu_seqlens, bool silu) {
  constexpr const char* op = "causal_conv1d";
  const DType dtype = kernel_dtype(op, "x", x.scalar_type());
  check_rank(op, "x", x, 3, "[B, T, C]");
  check_taps(op, x, weight, bias, x.size(2));
  int64_t sequences = x.size(0);
  if (cu_seqlens) {
    check_cu_seqlens(op, x, *cu_seqlens);
    sequences = cu_seqlens->size(0) - 1;
  }
  std::optional<Tensor> initial;
  if (initial_state) {
    check_same_device(op, "initial_state", *initial_state, x);
    check_floating(op, "initial_state", *initial_state);
    check_shape(op, "initial_state", *initial_state, {sequences, weight.size(1) - 1, x.size(2)});
    initial = inner_dense(narrow(*initial_state));
  }
  if (seq_idx) {
    check_same_device(op, "seq_idx", *seq_idx, x);
    check_integer(op, "seq_idx", *seq_idx);
    check_shape(op, "seq_idx", *seq_idx, {x.size(0), x.size(1)});
  }
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (y.numel() == 0) return y;
  const Tensor inputs = inner_dense(x), weights = dense(narrow(weight));
  std::optional<Tensor> biases;
  if (bias) biases = dense(narrow(*bias));
  const std::optional<Tensor> segments = dense_or_none(seq_idx), ends = dense_or_none(cu_seqlens);
  cuda::convolve({.x = inputs.const_data_ptr(),
                  .weight = weights.const_data_ptr(),
                  .bias = data_or_null(biases),
                  .initial = data_or_null(initial),
                  .seq_idx = data_or_null(segments),
                  .cu_seqlens = data_or_null(ends),
                  .y = y.mutable_data_ptr(),
                  .dtype = dtype,
                  .weight_dtype = kernel_dtype(op, "weight", weights.scalar_type()),
                  .bias_dtype = dtype_of(op, "bias", biases),
                  .initial_dtype = dtype_of(op, "initial_state", initial),
                  .wide_seq_idx = is_wide(segments),
                  .wide_cu_seqlens = is_wide(ends),
                  .silu = silu,
                  .batch = x.size(0),
                  .T = x.size(1),
                  .C = x.size(2),
                  .W = weight.size(1),
                  .sequences = sequences,
                  .x_batch = inputs.stride(0),
                  .x_time = inputs.stride(1),
                  .initial_sequence = initial ? initial->stride(0) : 0,
                  .initial_time = initial ? initial->stride(1) : 0},
                 Launch(x));
  return y;
}

}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CUDA, m) { m.impl("causal_conv1d", TORCH_BOX(&bitkernels::causal_conv1d_cuda)); }
