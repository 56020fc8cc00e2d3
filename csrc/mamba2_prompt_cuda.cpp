// mamba2_prompt on CUDA where Hopper's kernels were built: all kernels of a layer, launched one after the other.
#include "cuda/mamba2_prompt_cuda.h"

#include "cuda_operators.h"
#include "mamba2_step.h"

#ifdef BITKERNELS_SM90A

namespace bitkernels {
namespace {

void mamba2_prompt(Tensor residual, const Tensor& in_norm, const Tensor& in_packed, const Tensor& in_alpha,
                   const Tensor& in_beta, const std::optional<Tensor>& in_bias, Tensor conv_state,
                   const Tensor& conv_weight, const std::optional<Tensor>& conv_bias, Tensor ssm_state, const Tensor& A,
                   const std::optional<Tensor>& D, const Tensor& dt_bias, const Tensor& out_norm,
                   const Tensor& out_packed, const Tensor& out_alpha, const Tensor& out_beta,
                   const std::optional<Tensor>& out_bias, ScalarType dtype, double in_eps, double out_eps) {
  constexpr const char* op = "mamba2_prompt";
  constexpr const char* in_op = "mamba2_prompt, in_proj";
  constexpr const char* out_op = "mamba2_prompt, out_proj";
  check_rank(op, "residual", residual, 3, "[B, T, K]");
  check_dtype(op, "residual", residual, scale_type(dtype));
  const int64_t batch = residual.size(0), T = residual.size(1), tokens = batch * T;
  const Tensor sum = dense(residual), rows = torch::stable::view(sum, {tokens, residual.size(2)});
  InStep in(NormedProjection(in_op, "residual", rows, in_norm, in_packed, in_alpha, in_beta, in_bias, "dtype", dtype),
            in_eps);

  check_same_device(op, "ssm_state", ssm_state, residual);
  const DType ssm_dtype = kernel_dtype(op, "ssm_state", ssm_state.scalar_type());
  check_rank(op, "ssm_state", ssm_state, 4, "[B, H, P, N]");
  const int64_t H = ssm_state.size(1), P = ssm_state.size(2), N = ssm_state.size(3), inner = H * P;
  check_shape(op, "ssm_state", ssm_state, {batch, H, P, N});
  check_same_device(op, "conv_weight", conv_weight, residual);
  check_floating(op, "conv_weight", conv_weight);
  check_argument(conv_weight.dim() == 2 && conv_weight.size(1) >= 1, op, ": conv_weight must be [C, W], got ",
                 shape(conv_weight));
  const int64_t channels = conv_weight.size(0), W = conv_weight.size(1), both = channels - inner;
  check_argument(both > 0 && N > 0 && both % (2 * N) == 0, op,
                 ": conv_weight must have H P + 2 G N channels, H P = ", inner, " and N = ", N, ", got ", channels);
  const int64_t G = both / (2 * N), width = in.projection.args.N;
  check_argument(width == inner + channels + H, op, ": in_packed must have ", inner + channels + H,
                 " rows, z, x, B, C and dt, got ", width);
  check_same_device(op, "conv_state", conv_state, residual);
  const DType conv_dtype = kernel_dtype(op, "conv_state", conv_state.scalar_type());
  check_shape(op, "conv_state", conv_state, {batch, W - 1, channels});
  if (residual.numel() == 0) return;

  Tensor projected = torch::stable::new_empty(residual, {tokens, width}, dtype);
  const Launch launch(residual);
  in.run(projected, launch);
  Tensor columns = torch::stable::view(projected, {batch, T, width});
  const auto part = [](Tensor of, int64_t first, int64_t heads, int64_t size) {
    return torch::stable::view(torch::stable::narrow(of, 2, first, heads * size),
                               {of.size(0), of.size(1), heads, size});
  };
  const Tensor inputs = torch::stable::narrow(columns, 2, inner, channels);
  Tensor convolved = causal_conv1d_cuda(inputs, conv_weight, conv_bias, conv_state, std::nullopt, std::nullopt, true);
  const auto [y, final_states] =
      ssd_scan_cuda(part(convolved, 0, H, P), torch::stable::narrow(columns, 2, inner + channels, H), A,
                    part(convolved, inner, G, N), part(convolved, inner + G * N, G, N), D, part(columns, 0, H, P),
                    dt_bias, ssm_state, std::nullopt, std::nullopt, true, 0.0, std::nullopt, 64);

  Tensor state = inner_dense(ssm_state), conv = inner_dense(conv_state);
  if (state.stride(2) != N || state.stride(1) != P * N) state = torch::stable::contiguous(state);
  cuda::store_states({.final_states = static_cast<const float*>(final_states.const_data_ptr()),
                      .ssm = state.mutable_data_ptr(),
                      .inputs = inputs.const_data_ptr(),
                      .conv = conv.mutable_data_ptr(),
                      .dtype = in.projection.args.dtype,
                      .ssm_dtype = ssm_dtype,
                      .conv_dtype = conv_dtype,
                      .batch = batch,
                      .state = inner * N,
                      .T = T,
                      .channels = channels,
                      .W = W,
                      .ssm_batch = state.stride(0),
                      .input_batch = inputs.stride(0),
                      .input_time = inputs.stride(1),
                      .conv_batch = conv.stride(0),
                      .conv_time = conv.stride(1)},
                     launch);
  OutStep out(out_op,
              NormedProjection(out_op, "gated", torch::stable::view(y, {tokens, inner}), out_norm, out_packed,
                               out_alpha, out_beta, out_bias, "dtype", dtype),
              rows, out_eps);
  out.run(launch);
  copy_back(conv_state, conv);
  copy_back(ssm_state, state);
  copy_back(residual, sum);
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CUDA, m) { m.impl("mamba2_prompt", TORCH_BOX(&bitkernels::mamba2_prompt)); }

#endif
