// ssd_step: checks, allocation, dispatch.
#include "mixer.h"

namespace bitkernels {
namespace {

// The state is [B, H, P, N], or [slots, H, P, N] where state_indices names the slot of each request.
void check_state(const char* op, const Tensor& state, const std::optional<Tensor>& state_indices, const Tensor& x,
                 int64_t N) {
  const int64_t H = x.size(1), P = x.size(2);
  if (!state_indices) {
    check_shape(op, "state", state, {x.size(0), H, P, N});
    return;
  }
  check_rank(op, "state", state, 4, "[slots, H, P, N]");
  check_shape(op, "state", state, {state.size(0), H, P, N});
  check_slots(op, "state", *state_indices, x.size(0), state.size(0), x);
}

// Kernels read step sizes of any type of activations.
Tensor readable(const Tensor& dt, ScalarType acc) {
  const ScalarType dtype = dt.scalar_type();
  const bool wide = dtype == ScalarType::Double && acc != ScalarType::Double;
  return wide ? torch::stable::to(dt, acc) : dt;
}

Tensor ssd_step(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                const std::optional<Tensor>& D, const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
                bool dt_softplus, double dt_min, std::optional<double> dt_max,
                const std::optional<Tensor>& state_indices, const std::optional<Tensor>& seed,
                const std::optional<Tensor>& position) {
  constexpr const char* op = "ssd_step";
  const DType dtype = kernel_dtype(op, "x", x.scalar_type());
  const DType state_dtype = kernel_dtype(op, "state", state.scalar_type());
  check_same_device(op, "state", state, x);
  check_argument((dtype == DType::kFloat64) == (state_dtype == DType::kFloat64), op,
                 ": state must be Double where and only where x is, got ", name_of(state.scalar_type()));
  check_rank(op, "x", x, 3, "[B, H, P]");
  check_rank(op, "B", B, 3, "[B, G, N]");
  const int64_t batch = x.size(0), H = x.size(1), P = x.size(2), G = B.size(1), N = B.size(2);
  check_state(op, state, state_indices, x, N);
  check_argument(seed.has_value() == position.has_value(), op, ": seed and position must be given together");
  check_request(op, "seed", seed, batch, x);
  check_request(op, "position", position, batch, x);
  check_same_device(op, "dt", dt, x);
  check_floating(op, "dt", dt);
  check_shape(op, "dt", dt, {batch, H});
  check_same_device(op, "B", B, x);
  check_dtype(op, "B", B, x.scalar_type());
  check_shape(op, "B", B, {batch, G, N});
  check_groups(op, B, G, H);
  check_same_device(op, "C", C, x);
  check_dtype(op, "C", C, x.scalar_type());
  check_shape(op, "C", C, {batch, G, N});
  check_head_parameters(op, x, A, D, dt_bias, H, P);
  if (z) {
    check_same_device(op, "z", *z, x);
    check_dtype(op, "z", *z, x.scalar_type());
    check_shape(op, "z", *z, {batch, H, P});
  }
  const double high = limit_of(op, dt_min, dt_max);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (batch == 0) return y;

  const ScalarType acc = scale_type(x.scalar_type());
  const Tensor xd = inner_dense(x), Bd = inner_dense(B), Cd = inner_dense(C), Ad = as_dtype(A, acc);
  const Tensor dtd = readable(dt, acc);
  const std::optional<Tensor> zd = z ? std::optional(inner_dense(*z)) : std::nullopt, Dd = as_dtype(D, acc),
                              bias = as_dtype(dt_bias, acc);
  const std::optional<Tensor> slots = dense_integers(state_indices), seeds = dense_integers(seed),
                              positions = dense_integers(position);
  Tensor held = inner_dense(state);
  const BITKERNELS_BACKEND::SsdStep args{.state = held.mutable_data_ptr(),
                                         .x = strided_token(xd),
                                         .dt = strided_token(dtd),
                                         .B = strided_token(Bd),
                                         .C = strided_token(Cd),
                                         .z = zd ? strided_token(*zd) : BITKERNELS_BACKEND::Strided{},
                                         .A = Ad.const_data_ptr(),
                                         .D = data_or_null(Dd),
                                         .dt_bias = data_or_null(bias),
                                         .state_indices = static_cast<const int64_t*>(data_or_null(slots)),
                                         .seed = static_cast<const int64_t*>(data_or_null(seeds)),
                                         .position = static_cast<const int64_t*>(data_or_null(positions)),
                                         .y = y.mutable_data_ptr(),
                                         .dtype = dtype,
                                         .state_dtype = state_dtype,
                                         .dt_dtype = kernel_dtype(op, "dt", dtd.scalar_type()),
                                         .D_per_channel = D && D->dim() == 2,
                                         .dt_softplus = dt_softplus,
                                         .dt_min = dt_min,
                                         .dt_max = high,
                                         .slots = state.size(0),
                                         .state_batch = held.stride(0),
                                         .state_head = held.stride(1),
                                         .state_row = held.stride(2),
                                         .batch = batch,
                                         .H = H,
                                         .P = P,
                                         .G = G,
                                         .N = N};
  const Launch launch(x);
  BITKERNELS_BACKEND::ssd_step(args, launch);
  if (held.data_ptr() != state.data_ptr()) torch::stable::copy_(state, held);
  return y;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, BITKERNELS_DISPATCH_KEY, m) {
  m.impl("ssd_step", TORCH_BOX(&bitkernels::ssd_step));
}
