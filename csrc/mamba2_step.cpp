// mamba2_in_step, mamba2_out_step, and mamba2_step, which is both with ssd_step between: checks, allocation, dispatch.
#include "mamba2_step.h"

namespace bitkernels {
namespace {

Tensor mamba2_in_step(const Tensor& residual, const Tensor& norm_weight, const Tensor& w_packed, const Tensor& alpha,
                      const Tensor& beta, const std::optional<Tensor>& conv_state,
                      const std::optional<Tensor>& conv_weight, const std::optional<Tensor>& conv_bias,
                      int64_t conv_start, ScalarType dtype, const std::optional<Tensor>& bias, double eps,
                      const std::optional<Tensor>& state_indices) {
  constexpr const char* op = "mamba2_in_step";
  check_dtype(op, "residual", residual, scale_type(dtype));
  check_argument(conv_state.has_value() == conv_weight.has_value(), op,
                 ": conv_state and conv_weight must be given together");
  NormedProjection projection(op, "residual", residual, norm_weight, w_packed, alpha, beta, bias, "dtype", dtype);
  InStep step = conv_state ? InStep(op, residual, std::move(projection), *conv_state, *conv_weight, conv_bias,
                                    conv_start, eps, state_indices)
                           : InStep(std::move(projection), eps);
  Tensor y = torch::stable::new_empty(residual, {residual.size(0), step.projection.args.N}, dtype);
  if (y.numel() == 0) return y;
  step.run(y, Launch(residual));
  if (conv_state) copy_back(*conv_state, *step.conv_state);
  return y;
}

void mamba2_out_step(Tensor residual, const Tensor& y, const Tensor& norm_weight, const Tensor& w_packed,
                     const Tensor& alpha, const Tensor& beta, const std::optional<Tensor>& bias, double eps) {
  constexpr const char* op = "mamba2_out_step";
  check_same_device(op, "residual", residual, y);
  NormedProjection projection(op, "y", y, norm_weight, w_packed, alpha, beta, bias, "y", y.scalar_type());
  check_dtype(op, "residual", residual, scale_type(y.scalar_type()));
  OutStep step(op, std::move(projection), residual, eps);
  if (residual.numel() == 0) return;
  step.run(Launch(y));
  copy_back(residual, step.residual);
}

void mamba2_step(Tensor residual, const Tensor& in_norm, const Tensor& in_packed, const Tensor& in_alpha,
                 const Tensor& in_beta, const std::optional<Tensor>& in_bias, Tensor conv_state,
                 const Tensor& conv_weight, const std::optional<Tensor>& conv_bias, Tensor ssm_state, const Tensor& A,
                 const std::optional<Tensor>& D, const std::optional<Tensor>& dt_bias, const Tensor& out_norm,
                 const Tensor& out_packed, const Tensor& out_alpha, const Tensor& out_beta,
                 const std::optional<Tensor>& out_bias, ScalarType dtype, double in_eps, double out_eps,
                 const std::optional<Tensor>& state_indices, const std::optional<Tensor>& seed,
                 const std::optional<Tensor>& position) {
  constexpr const char* op = "mamba2_step";
  constexpr const char* in_op = "mamba2_step, in_proj";
  constexpr const char* out_op = "mamba2_step, out_proj";
  const ScalarType acc = scale_type(dtype);
  check_dtype(op, "residual", residual, acc);
  check_same_device(op, "ssm_state", ssm_state, residual);
  const DType state_dtype = kernel_dtype(op, "ssm_state", ssm_state.scalar_type());
  check_argument((acc == ScalarType::Double) == (state_dtype == DType::kFloat64), op,
                 ": ssm_state must be Double where and only where dtype is, got ", name_of(ssm_state.scalar_type()));
  check_rank(op, "ssm_state", ssm_state, 4, state_indices ? "[slots, H, P, N]" : "[B, H, P, N]");
  const int64_t H = ssm_state.size(1), P = ssm_state.size(2), N = ssm_state.size(3), inner = H * P;

  InStep in(
      op, residual,
      NormedProjection(in_op, "residual", residual, in_norm, in_packed, in_alpha, in_beta, in_bias, "dtype", dtype),
      conv_state, conv_weight, conv_bias, inner, in_eps, state_indices);
  const int64_t batch = in.projection.args.M, width = in.projection.args.N, both = in.args.conv.channels - inner;
  check_argument(both > 0 && N > 0 && both % (2 * N) == 0, op,
                 ": conv_weight must have H P + 2 G N channels, H P = ", inner, " and N = ", N, ", got ",
                 in.args.conv.channels);
  const int64_t G = both / (2 * N);
  check_argument(H % G == 0, op, ": the number of groups in conv_weight must divide ", H, " heads, got ", G);
  check_argument(width == 2 * inner + both + H, op, ": in_packed must have ", 2 * inner + both + H,
                 " rows, z, x, B, C and dt, got ", width);
  check_shape(op, "ssm_state", ssm_state, {state_indices ? ssm_state.size(0) : batch, H, P, N});
  if (state_indices) check_slots(op, "ssm_state", *state_indices, batch, ssm_state.size(0), residual);
  check_head_parameters(op, residual, A, D, dt_bias, H, P);
  check_argument(seed.has_value() == position.has_value(), op, ": seed and position must be given together");
  check_request(op, "seed", seed, batch, residual);
  check_request(op, "position", position, batch, residual);

  Tensor projected = torch::stable::new_empty(residual, {batch, width}, dtype);
  Tensor gated = torch::stable::new_empty(residual, {batch, inner}, dtype);
  OutStep out(
      op, NormedProjection(out_op, "gated", gated, out_norm, out_packed, out_alpha, out_beta, out_bias, "dtype", dtype),
      residual, out_eps);
  if (residual.numel() == 0) return;

  const Tensor decay = as_dtype(A, acc);
  const std::optional<Tensor> skip = as_dtype(D, acc), step_bias = as_dtype(dt_bias, acc), seeds = dense_integers(seed),
                              positions = dense_integers(position);
  Tensor state = inner_dense(ssm_state);
  const int64_t bytes = projected.element_size();
  const auto columns = [&](int64_t first, int64_t head) {
    return BITKERNELS_BACKEND::Strided{static_cast<char*>(projected.data_ptr()) + first * bytes, width, 0, head};
  };
  const BITKERNELS_BACKEND::SsdStep step{.state = state.mutable_data_ptr(),
                                         .x = columns(inner, P),
                                         .dt = columns(2 * inner + both, 1),
                                         .B = columns(2 * inner, N),
                                         .C = columns(2 * inner + G * N, N),
                                         .z = columns(0, P),
                                         .A = decay.const_data_ptr(),
                                         .D = data_or_null(skip),
                                         .dt_bias = data_or_null(step_bias),
                                         .state_indices = in.args.conv.state_indices,
                                         .seed = static_cast<const int64_t*>(data_or_null(seeds)),
                                         .position = static_cast<const int64_t*>(data_or_null(positions)),
                                         .y = gated.mutable_data_ptr(),
                                         .dtype = in.args.linear.dtype,
                                         .state_dtype = state_dtype,
                                         .dt_dtype = in.args.linear.dtype,
                                         .D_per_channel = D && D->dim() == 2,
                                         .dt_softplus = true,
                                         .dt_min = 0,
                                         .dt_max = std::numeric_limits<double>::infinity(),
                                         .slots = state.size(0),
                                         .state_batch = state.stride(0),
                                         .state_head = state.stride(1),
                                         .state_row = state.stride(2),
                                         .batch = batch,
                                         .H = H,
                                         .P = P,
                                         .G = G,
                                         .N = N,
                                         .after_projection = true};
  const Launch launch(residual);
  in.args.next = &step;
  in.run(projected, launch);
  BITKERNELS_BACKEND::ssd_step(step, launch);
  out.run(launch);
  copy_back(conv_state, *in.conv_state);
  copy_back(ssm_state, state);
  copy_back(residual, out.residual);
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, BITKERNELS_DISPATCH_KEY, m) {
  m.impl("mamba2_in_step", TORCH_BOX(&bitkernels::mamba2_in_step));
  m.impl("mamba2_out_step", TORCH_BOX(&bitkernels::mamba2_out_step));
  m.impl("mamba2_step", TORCH_BOX(&bitkernels::mamba2_step));
}
