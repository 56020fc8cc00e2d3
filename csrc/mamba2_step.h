// The arguments of a decode step's two projections, checked, and the tensors that their pointers lie in.
#pragma once

#include <utility>

#include "mixer.h"

namespace bitkernels {

// A norm and a packed projection.
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

// With a step of the convolution over some columns, or without.
struct InStep {
  NormedProjection projection;
  std::optional<Tensor> conv_weight, conv_state, conv_bias, state_indices;
  BITKERNELS_BACKEND::Mamba2InStep args;

  InStep(NormedProjection normed, double eps) : projection(std::move(normed)) {
    args = {.linear = projection.args,
            .norm_weight = projection.norm_weight.const_data_ptr(),
            .eps = eps,
            .conv = {},
            .next = nullptr};
  }

  InStep(const char* op, const Tensor& residual, NormedProjection normed, const Tensor& state, const Tensor& weight,
         const std::optional<Tensor>& bias, int64_t conv_start, double eps, const std::optional<Tensor>& indices)
      : InStep(std::move(normed), eps) {
    const int64_t batch = residual.size(0), N = projection.args.N;
    check_same_device(op, "conv_weight", weight, residual);
    check_floating(op, "conv_weight", weight);
    check_argument(weight.dim() == 2 && weight.size(1) >= 1, op, ": conv_weight must be [C, W], got ", shape(weight));
    const int64_t channels = weight.size(0), W = weight.size(1);
    check_argument(conv_start >= 0 && conv_start + channels <= N, op, ": conv_start must leave room for ", channels,
                   " channels in ", N, " columns, got ", conv_start);
    if (bias) {
      check_same_device(op, "conv_bias", *bias, residual);
      check_floating(op, "conv_bias", *bias);
      check_shape(op, "conv_bias", *bias, {channels});
    }
    check_same_device(op, "conv_state", state, residual);
    const DType state_dtype = kernel_dtype(op, "conv_state", state.scalar_type());
    check_rank(op, "conv_state", state, 3, indices ? "[slots, W - 1, C]" : "[B, W - 1, C]");
    check_shape(op, "conv_state", state, {indices ? state.size(0) : batch, W - 1, channels});
    if (indices) check_slots(op, "conv_state", *indices, batch, state.size(0), residual);
    conv_weight = as_dtype(weight, residual.scalar_type());
    conv_bias = as_dtype(bias, residual.scalar_type());
    conv_state = inner_dense(state);
    state_indices = dense_integers(indices);
    args.conv = {.state = conv_state->mutable_data_ptr(),
                 .weight = conv_weight->const_data_ptr(),
                 .bias = data_or_null(conv_bias),
                 .state_indices = static_cast<const int64_t*>(data_or_null(state_indices)),
                 .state_dtype = state_dtype,
                 .state_batch = conv_state->stride(0),
                 .state_row = conv_state->stride(1),
                 .slots = conv_state->size(0),
                 .first = conv_start,
                 .channels = channels,
                 .W = W};
  }

  void run(Tensor& y, const Launch& launch) {
    args.linear.y = y.mutable_data_ptr();
    const std::optional<Tensor> workspace = workspace_like(y, BITKERNELS_BACKEND::mamba2_in_step_workspace(args));
    args.linear.workspace = mutable_data_or_null(workspace);
    BITKERNELS_BACKEND::mamba2_in_step(args, launch);
  }
};

// Added to the residual.
struct OutStep {
  NormedProjection projection;
  Tensor residual;
  BITKERNELS_BACKEND::Mamba2OutStep args;

  OutStep(const char* op, NormedProjection normed, const Tensor& sum, double eps)
      : projection(std::move(normed)), residual(sum) {
    check_shape(op, "residual", sum, {projection.args.M, projection.args.N});
    residual = dense(sum);
    args = {.linear = projection.args,
            .norm_weight = projection.norm_weight.const_data_ptr(),
            .eps = eps,
            .residual = residual.mutable_data_ptr()};
  }

  void run(const Launch& launch) {
    const std::optional<Tensor> workspace =
        workspace_like(residual, BITKERNELS_BACKEND::mamba2_out_step_workspace(args));
    args.linear.workspace = mutable_data_or_null(workspace);
    BITKERNELS_BACKEND::mamba2_out_step(args, launch);
  }
};

// What was worked on where the argument itself is not dense.
inline void copy_back(Tensor to, const Tensor& from) {
  if (to.data_ptr() != from.data_ptr()) torch::stable::copy_(to, from);
}

}  // namespace bitkernels
