// mamba2_in_step and mamba2_out_step: checks, allocation, dispatch.
#include "mixer.h"

namespace bitkernels {
namespace {

// A norm and a packed projection; the tensors that its pointers lie in.
struct NormedProjection {
  Tensor x, w_packed, alpha, beta, norm_weight;
  std::optional<Tensor> bias;
  BITKERNELS_BACKEND::PackedLinear args;

  NormedProjection(const char* op, const char* x_name, const Tensor& x_in, const Tensor& norm_in, const Tensor& w_in,
                   const Tensor& alpha_in, const Tensor& beta_in, const std::optional<Tensor>& bias_in,
                   const char* dtype_name, ScalarType dtype)
      : x(dense(x_in)),
        w_packed(dense(w_in)),
        alpha(as_dtype(alpha_in, scale_type(dtype))),
        beta(as_dtype(beta_in, scale_type(dtype))),
        norm_weight(as_dtype(norm_in, scale_type(dtype))),
        bias(as_dtype(bias_in, scale_type(dtype))) {
    check_rank(op, x_name, x_in, 2, "[B, K]");
    const int64_t K = x.size(1), N = w_packed.size(0);
    for (const auto& [name, t] : {std::pair{"norm_weight", &norm_in}, {"alpha", &alpha_in}, {"beta", &beta_in}}) {
      check_same_device(op, name, *t, x);
      check_floating(op, name, *t);
    }
    check_same_device(op, "w_packed", w_packed, x);
    check_packed(op, w_in, K, kSignsPerWord);
    check_shape(op, "norm_weight", norm_in, {K});
    check_argument(K > 0, op, ": ", x_name, " must have at least one column, got ", shape(x_in));
    const ScaleAxis axis = scale_axis(op, alpha_in.sizes(), N, K);
    check_argument(shape(beta_in) == shape(alpha_in), op, ": beta must have alpha's shape ", shape(alpha_in), ", got ",
                   shape(beta_in));
    if (bias_in) {
      check_same_device(op, "bias", *bias_in, x);
      check_floating(op, "bias", *bias_in);
      check_shape(op, "bias", *bias_in, {N});
    }
    args = {.x = x.const_data_ptr(),
            .w_packed = words(w_packed),
            .alpha = alpha.const_data_ptr(),
            .beta = beta.const_data_ptr(),
            .bias = data_or_null(bias),
            .y = nullptr,
            .workspace = nullptr,
            .dtype = kernel_dtype(op, dtype_name, dtype),
            .axis = axis,
            .M = x.size(0),
            .N = N,
            .K = K};
  }
};

Tensor mamba2_in_step(const Tensor& residual, const Tensor& norm_weight, const Tensor& w_packed, const Tensor& alpha,
                      const Tensor& beta, Tensor conv_state, const Tensor& conv_weight,
                      const std::optional<Tensor>& conv_bias, int64_t conv_start, ScalarType dtype,
                      const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& state_indices) {
  constexpr const char* op = "mamba2_in_step";
  const ScalarType acc = scale_type(dtype);
  check_dtype(op, "residual", residual, acc);
  NormedProjection projection(op, "residual", residual, norm_weight, w_packed, alpha, beta, bias, "dtype", dtype);
  const int64_t batch = residual.size(0), N = projection.args.N;

  check_same_device(op, "conv_weight", conv_weight, residual);
  check_floating(op, "conv_weight", conv_weight);
  check_argument(conv_weight.dim() == 2 && conv_weight.size(1) >= 1, op, ": conv_weight must be [C, W], got ",
                 shape(conv_weight));
  const int64_t channels = conv_weight.size(0), W = conv_weight.size(1);
  check_argument(conv_start >= 0 && conv_start + channels <= N, op, ": conv_start must leave room for ", channels,
                 " channels in ", N, " columns, got ", conv_start);
  if (conv_bias) {
    check_same_device(op, "conv_bias", *conv_bias, residual);
    check_floating(op, "conv_bias", *conv_bias);
    check_shape(op, "conv_bias", *conv_bias, {channels});
  }
  check_same_device(op, "conv_state", conv_state, residual);
  const DType state_dtype = kernel_dtype(op, "conv_state", conv_state.scalar_type());
  check_rank(op, "conv_state", conv_state, 3, state_indices ? "[slots, W - 1, C]" : "[B, W - 1, C]");
  check_shape(op, "conv_state", conv_state, {state_indices ? conv_state.size(0) : batch, W - 1, channels});
  if (state_indices) check_slots(op, "conv_state", *state_indices, batch, conv_state.size(0), residual);

  Tensor y = torch::stable::new_empty(residual, {batch, N}, dtype);
  if (y.numel() == 0) return y;
  const Tensor weight = as_dtype(conv_weight, acc);
  const std::optional<Tensor> added = as_dtype(conv_bias, acc), slots = dense_integers(state_indices);
  Tensor held = inner_dense(conv_state);
  projection.args.y = y.mutable_data_ptr();
  BITKERNELS_BACKEND::Mamba2InStep args{
      .linear = projection.args,
      .norm_weight = projection.norm_weight.const_data_ptr(),
      .eps = eps,
      .conv = {.state = held.mutable_data_ptr(),
               .weight = weight.const_data_ptr(),
               .bias = data_or_null(added),
               .state_indices = static_cast<const int64_t*>(data_or_null(slots)),
               .state_dtype = state_dtype,
               .state_batch = held.stride(0),
               .state_row = held.stride(1),
               .slots = held.size(0),
               .first = conv_start,
               .channels = channels,
               .W = W},
  };
  const Tensor workspace = workspace_like(residual, BITKERNELS_BACKEND::mamba2_in_step_workspace(args));
  args.linear.workspace = workspace.mutable_data_ptr();
  const Launch launch(residual);
  BITKERNELS_BACKEND::mamba2_in_step(args, launch);
  if (held.data_ptr() != conv_state.data_ptr()) torch::stable::copy_(conv_state, held);
  return y;
}

void mamba2_out_step(Tensor residual, const Tensor& y, const Tensor& norm_weight, const Tensor& w_packed,
                     const Tensor& alpha, const Tensor& beta, const std::optional<Tensor>& bias, double eps) {
  constexpr const char* op = "mamba2_out_step";
  check_same_device(op, "residual", residual, y);
  NormedProjection projection(op, "y", y, norm_weight, w_packed, alpha, beta, bias, "y", y.scalar_type());
  check_dtype(op, "residual", residual, scale_type(y.scalar_type()));
  check_shape(op, "residual", residual, {y.size(0), projection.args.N});
  if (residual.numel() == 0) return;
  Tensor sum = dense(residual);
  BITKERNELS_BACKEND::Mamba2OutStep args{.linear = projection.args,
                                         .norm_weight = projection.norm_weight.const_data_ptr(),
                                         .eps = eps,
                                         .residual = sum.mutable_data_ptr()};
  const Tensor workspace = workspace_like(y, BITKERNELS_BACKEND::mamba2_out_step_workspace(args));
  args.linear.workspace = workspace.mutable_data_ptr();
  const Launch launch(y);
  BITKERNELS_BACKEND::mamba2_out_step(args, launch);
  if (sum.data_ptr() != residual.data_ptr()) torch::stable::copy_(residual, sum);
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, BITKERNELS_DISPATCH_KEY, m) {
  m.impl("mamba2_in_step", TORCH_BOX(&bitkernels::mamba2_in_step));
  m.impl("mamba2_out_step", TORCH_BOX(&bitkernels::mamba2_out_step));
}
