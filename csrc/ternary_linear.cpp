// ternary_linear and its backward: checks, allocation, dispatch.
#include "op.h"

namespace bitkernels {
namespace {

struct Problem {
  DType dtype;
  ScalarType scales;
  int64_t M, N, K;
};

// x is [..., K], or the gradient [..., N] of the backward.
Problem check(const char* op, const char* argument, const Tensor& x, const Tensor& w_packed, const Tensor& scale,
              int64_t K) {
  const DType dtype = kernel_dtype(op, argument, x.scalar_type());
  check_same_device(op, "w_packed", w_packed, x);
  check_same_device(op, "scale", scale, x);
  check_floating(op, "scale", scale);
  check_packed(op, w_packed, K, kTernaryPerWord);
  check_argument(scale.numel() == 1, op, ": scale must be of shape [1], got ", shape(scale));
  return {dtype, scale_type(x.scalar_type()), rows(x), w_packed.size(0), K};
}

Tensor ternary_linear(const Tensor& x, const Tensor& w_packed, const Tensor& scale, const std::optional<Tensor>& bias,
                      std::optional<int64_t> act_bits) {
  constexpr const char* op = "ternary_linear";
  check_argument(x.dim() >= 1, op, ": x must have at least one dimension");
  check_argument(!act_bits || *act_bits == 8, op, ": act_bits must be None or 8, got ", act_bits.value_or(0));
  const Problem p = check(op, "x", x, w_packed, scale, x.size(-1));
  if (bias) {
    check_same_device(op, "bias", *bias, x);
    check_floating(op, "bias", *bias);
    check_shape(op, "bias", *bias, {p.N});
  }
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, p.N));
  if (y.numel() == 0) return y;

  const Tensor xd = dense(x), wd = dense(w_packed), sd = as_dtype(scale, p.scales);
  const std::optional<Tensor> bias_d = as_dtype(bias, p.scales);
  BITKERNELS_BACKEND::TernaryLinear args{
      .x = xd.const_data_ptr(),
      .w_packed = words(wd),
      .scale = sd.const_data_ptr(),
      .bias = data_or_null(bias_d),
      .y = y.mutable_data_ptr(),
      .workspace = nullptr,
      .dtype = p.dtype,
      .int8_activations = act_bits.has_value(),
      .M = p.M,
      .N = p.N,
      .K = p.K,
  };
  const Launch launch(x);
  const std::optional<Tensor> workspace = workspace_like(x, BITKERNELS_BACKEND::ternary_linear_workspace(args));
  args.workspace = mutable_data_or_null(workspace);
  BITKERNELS_BACKEND::ternary_linear(args, launch);
  return y;
}

Tensor ternary_linear_backward(const Tensor& grad, const Tensor& w_packed, const Tensor& scale, int64_t K) {
  constexpr const char* op = "ternary_linear_backward";
  check_argument(grad.dim() >= 1, op, ": grad must have at least one dimension");
  check_argument(K >= 0, op, ": K must not be negative, got ", K);
  const Problem p = check(op, "grad", grad, w_packed, scale, K);
  check_argument(grad.size(-1) == p.N, op, ": grad must have N = ", p.N, " values in its last dimension, got ",
                 grad.size(-1));
  Tensor dx = torch::stable::new_empty(grad, sizes_with_last(grad, K));
  if (dx.numel() == 0) return dx;
  if (p.N == 0) return torch::stable::zero_(dx);

  const Tensor gd = dense(grad), wd = dense(w_packed), sd = as_dtype(scale, p.scales);
  BITKERNELS_BACKEND::TernaryLinearBackward args{
      .grad = gd.const_data_ptr(),
      .w_packed = words(wd),
      .scale = sd.const_data_ptr(),
      .dx = dx.mutable_data_ptr(),
      .workspace = nullptr,
      .dtype = p.dtype,
      .M = p.M,
      .N = p.N,
      .K = p.K,
  };
  const Launch launch(grad);
  const std::optional<Tensor> workspace =
      workspace_like(grad, BITKERNELS_BACKEND::ternary_linear_backward_workspace(args));
  args.workspace = mutable_data_or_null(workspace);
  BITKERNELS_BACKEND::ternary_linear_backward(args, launch);
  return dx;
}

std::string explain_ternary_linear(const Tensor& like, int64_t M, int64_t N, int64_t K,
                                   std::optional<int64_t> act_bits) {
  constexpr const char* op = "explain";
  check_sizes(op, M, N, K);
  check_argument(!act_bits || *act_bits == 8, op, ": act_bits must be None or 8, got ", act_bits.value_or(0));
  const Launch launch(like);
  return BITKERNELS_BACKEND::explain(BITKERNELS_BACKEND::TernaryLinear{
      .x = nullptr,
      .w_packed = nullptr,
      .scale = nullptr,
      .bias = nullptr,
      .y = nullptr,
      .workspace = nullptr,
      .dtype = kernel_dtype(op, "dtype", like.scalar_type()),
      .int8_activations = act_bits.has_value(),
      .M = M,
      .N = N,
      .K = K,
  });
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, BITKERNELS_DISPATCH_KEY, m) {
  m.impl("ternary_linear", TORCH_BOX(&bitkernels::ternary_linear));
  m.impl("explain_ternary_linear", TORCH_BOX(&bitkernels::explain_ternary_linear));
  m.impl("ternary_linear_backward", TORCH_BOX(&bitkernels::ternary_linear_backward));
}
