// ssd_scan_backward_hopper: allocation and launch. Arguments were checked by bitkernels/triton/ssd_scan_backward.py,
// which calls it.
#include "cuda/ssd_scan_backward_hopper.h"

#include <limits>

#include "op.h"

// Without code for sm_90a it would launch kernels that do nothing.
#ifdef BITKERNELS_SM90A

namespace bitkernels {
namespace {

cuda::ScanTensor view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

const float* floats(const std::optional<Tensor>& t) { return static_cast<const float*>(data_or_null(t)); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_scan_backward_hopper(
    const Tensor& dy, const std::optional<Tensor>& dfinal_states, const Tensor& x, const Tensor& dt, const Tensor& A,
    const Tensor& B, const Tensor& C, const std::optional<Tensor>& D, const std::optional<Tensor>& z,
    const std::optional<Tensor>& dt_bias, const std::optional<Tensor>& initial_states, bool dt_softplus, double dt_min,
    std::optional<double> dt_max, int64_t rows, int64_t length, int64_t splits) {
  constexpr const char* op = "ssd_scan_backward_hopper";
  constexpr ScalarType acc = ScalarType::Float;
  const Tensor Ad = as_dtype(A, acc);
  const std::optional<Tensor> Dd = as_dtype(D, acc), bias = as_dtype(dt_bias, acc),
                              initial = as_dtype(initial_states, acc), dfinal = as_dtype(dfinal_states, acc);
  const auto like = [](const Tensor& t, ScalarType dtype) { return torch::stable::new_empty(t, t.sizes(), dtype); };
  const auto none = [&] { return torch::stable::new_empty(x, {0}, acc); };
  const auto like_or_none = [&](const std::optional<Tensor>& t) { return t ? like(*t, acc) : none(); };
  const auto floats_of = [](Tensor& t, bool given) {
    return given ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
  };
  Tensor dx = like(x, x.scalar_type()), ddt = like(dt, dt.scalar_type()), dA = like(A, acc),
         dB = like(B, B.scalar_type()), dC = like(C, C.scalar_type()), dD = like_or_none(D),
         dz = z ? like(*z, z->scalar_type()) : none(), ddt_bias = like_or_none(dt_bias),
         dinitial = like_or_none(initial_states);
  cuda::HopperScanBackward args{.dy = view(dy),
                                .x = view(x),
                                .B = view(B),
                                .C = view(C),
                                .z = z ? view(*z) : cuda::ScanTensor{},
                                .dt = view(dt),
                                .A = static_cast<const float*>(Ad.const_data_ptr()),
                                .dt_bias = floats(bias),
                                .D = floats(Dd),
                                .initial = floats(initial),
                                .dfinal = floats(dfinal),
                                .dx = dx.mutable_data_ptr(),
                                .dz = z ? dz.mutable_data_ptr() : nullptr,
                                .ddt = ddt.mutable_data_ptr(),
                                .dB = dB.mutable_data_ptr(),
                                .dC = dC.mutable_data_ptr(),
                                .dA = floats_of(dA, true),
                                .ddt_bias = floats_of(ddt_bias, dt_bias.has_value()),
                                .dD = floats_of(dD, D.has_value()),
                                .dinitial = floats_of(dinitial, initial_states.has_value()),
                                .dtype = kernel_dtype(op, "x", x.scalar_type()),
                                .dt_dtype = kernel_dtype(op, "dt", dt.scalar_type()),
                                .dt_softplus = dt_softplus,
                                .dt_min = static_cast<float>(dt_min),
                                .dt_max = static_cast<float>(dt_max.value_or(std::numeric_limits<double>::infinity())),
                                .batch = x.size(0),
                                .T = x.size(1),
                                .H = x.size(2),
                                .G = B.size(2),
                                .N = B.size(3),
                                .rows = rows,
                                .length = length,
                                .splits = splits};
  const std::optional<Tensor> workspace = workspace_like(x, cuda::ssd_scan_backward_hopper_workspace(args));
  args.workspace = mutable_data_or_null(workspace);
  cuda::ssd_scan_backward_hopper(args, Launch(x));
  return {dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial};
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CUDA, m) {
  m.impl("ssd_scan_backward_hopper", TORCH_BOX(&bitkernels::ssd_scan_backward_hopper));
}

#endif
