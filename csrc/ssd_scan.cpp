// ssd_scan and its backward: checks, allocation, dispatch.
#include "mixer.h"

namespace bitkernels {
namespace {

// The kernel's description of the problem, and what keeps its pointers alive.
struct Scan {
  std::vector<cpu::Sequence> sequences;
  Tensor x, dt, A, B, C;
  std::optional<Tensor> D, z, dt_bias, initial_states, seq_idx;
  cpu::SsdScan args;

  Scan(const char* op, const ScanArguments& a)
      : sequences(check(op, a)),
        x(inner_dense(a.x)),
        dt(a.dt.scalar_type() == acc() ? a.dt : torch::stable::to(a.dt, acc())),
        A(as_dtype(a.A, acc())),
        B(inner_dense(a.B)),
        C(inner_dense(a.C)),
        D(as_dtype(a.D, acc())),
        z(a.z ? std::optional(inner_dense(*a.z)) : std::nullopt),
        dt_bias(as_dtype(a.dt_bias, acc())),
        initial_states(as_dtype(a.initial_states, acc())),
        seq_idx(as_dtype(a.seq_idx, ScalarType::Long)) {
    args = {.x = strided(x),
            .dt = strided(dt),
            .B = strided(B),
            .C = strided(C),
            .z = z ? strided(*z) : cpu::Strided{},
            .A = A.const_data_ptr(),
            .D = data_or_null(D),
            .dt_bias = data_or_null(dt_bias),
            .initial_states = data_or_null(initial_states),
            .seq_idx = static_cast<const int64_t*>(data_or_null(seq_idx)),
            .y = nullptr,
            .final_states = nullptr,
            .sequences = sequences.data(),
            .workspace = nullptr,
            .dtype = kernel_dtype(op, "x", x.scalar_type()),
            .D_per_channel = D && D->dim() == 2,
            .dt_softplus = a.dt_softplus,
            .dt_min = a.dt_min,
            .dt_max = limit_of(op, a.dt_min, a.dt_max),
            .S = static_cast<int64_t>(sequences.size()),
            .T = x.size(1),
            .H = x.size(2),
            .P = x.size(3),
            .G = B.size(2),
            .N = B.size(3)};
  }

  ScalarType acc() const { return scale_type(x.scalar_type()); }

  std::vector<int64_t> state_sizes() const { return {args.S, args.H, args.P, args.N}; }

  static std::vector<cpu::Sequence> check(const char* op, const ScanArguments& a) {
    check_scan(op, a);
    std::vector<cpu::Sequence> out = bitkernels::sequences(op, a.x, a.cu_seqlens, cpu::ssd_scan_chunks);
    check_initial_states(op, a, static_cast<int64_t>(out.size()));
    return out;
  }
};

std::tuple<Tensor, Tensor> ssd_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                    const Tensor& C, const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                                    const std::optional<Tensor>& dt_bias, const std::optional<Tensor>& initial_states,
                                    const std::optional<Tensor>& seq_idx, const std::optional<Tensor>& cu_seqlens,
                                    bool dt_softplus, double dt_min, std::optional<double> dt_max, int64_t chunk_size) {
  Scan scan("ssd_scan", {x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min,
                         dt_max, chunk_size});
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor final_states = torch::stable::new_empty(x, scan.state_sizes(), scan.acc());
  if (scan.args.S == 0) return {y, final_states};
  const std::optional<Tensor> workspace = workspace_like(x, cpu::ssd_scan_workspace(scan.args));
  scan.args.y = y.mutable_data_ptr();
  scan.args.final_states = final_states.mutable_data_ptr();
  scan.args.workspace = mutable_data_or_null(workspace);
  cpu::ssd_scan(scan.args, Launch(x));
  return {y, final_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_scan_backward(
    const Tensor& dy, const std::optional<Tensor>& dfinal_states, const Tensor& x, const Tensor& dt, const Tensor& A,
    const Tensor& B, const Tensor& C, const std::optional<Tensor>& D, const std::optional<Tensor>& z,
    const std::optional<Tensor>& dt_bias, const std::optional<Tensor>& initial_states,
    const std::optional<Tensor>& seq_idx, const std::optional<Tensor>& cu_seqlens, bool dt_softplus, double dt_min,
    std::optional<double> dt_max, int64_t chunk_size) {
  constexpr const char* op = "ssd_scan_backward";
  Scan scan(op, {x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max,
                 chunk_size});
  const ScalarType acc = scan.acc();
  check_same_device(op, "dy", dy, x);
  check_dtype(op, "dy", dy, x.scalar_type());
  check_shape(op, "dy", dy, {x.size(0), x.size(1), x.size(2), x.size(3)});
  if (dfinal_states) {
    check_same_device(op, "dfinal_states", *dfinal_states, x);
    check_floating(op, "dfinal_states", *dfinal_states);
    check_shape(op, "dfinal_states", *dfinal_states, {scan.args.S, scan.args.H, scan.args.P, scan.args.N});
  }
  auto like = [&](const Tensor& t, ScalarType dtype) { return torch::stable::new_empty(t, t.sizes(), dtype); };
  auto like_or_empty = [&](const std::optional<Tensor>& t, ScalarType dtype) {
    return t ? like(*t, dtype) : empty_gradient(x);
  };
  Tensor dx = like(x, x.scalar_type()), ddt = like(dt, acc), dA = like(A, acc), dB = like(B, B.scalar_type()),
         dC = like(C, C.scalar_type()), dD = like_or_empty(D, acc), dz = like_or_empty(z, x.scalar_type()),
         ddt_bias = like_or_empty(dt_bias, acc), dinitial_states = like_or_empty(initial_states, acc);
  if (scan.args.S == 0) {
    for (Tensor* t : {&dA, &dD, &ddt_bias}) torch::stable::zero_(*t);
  } else {
    const Tensor dy_dense = inner_dense(dy);
    const std::optional<Tensor> dfinal = as_dtype(dfinal_states, acc);
    cpu::SsdScanBackward args{.forward = scan.args,
                              .dy = strided(dy_dense),
                              .dfinal_states = data_or_null(dfinal),
                              .dx = dx.mutable_data_ptr(),
                              .dz = z ? dz.mutable_data_ptr() : nullptr,
                              .dB = dB.mutable_data_ptr(),
                              .dC = dC.mutable_data_ptr(),
                              .ddt = ddt.mutable_data_ptr(),
                              .dA = dA.mutable_data_ptr(),
                              .ddt_bias = dt_bias ? ddt_bias.mutable_data_ptr() : nullptr,
                              .dD = D ? dD.mutable_data_ptr() : nullptr,
                              .dinitial_states = initial_states ? dinitial_states.mutable_data_ptr() : nullptr};
    const std::optional<Tensor> workspace = workspace_like(x, cpu::ssd_scan_backward_workspace(args));
    args.forward.workspace = mutable_data_or_null(workspace);
    cpu::ssd_scan_backward(args, Launch(x));
  }
  if (dt.scalar_type() != acc) ddt = torch::stable::to(ddt, dt.scalar_type());
  return {dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states};
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CPU, m) {
  m.impl("ssd_scan", TORCH_BOX(&bitkernels::ssd_scan));
  m.impl("ssd_scan_backward", TORCH_BOX(&bitkernels::ssd_scan_backward));
}
