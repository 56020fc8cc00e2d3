// ssd_scan_backward_hopper: dispatch. Arguments were checked and results allocated by
// bitkernels/triton/ssd_scan_backward.py, which calls it.
#include "cuda/ssd_scan_backward_hopper.h"

#include <limits>

#include "op.h"

// Without code for sm_90a it would launch kernels that do nothing.
#ifdef BITKERNELS_SM90A

namespace bitkernels {
namespace {

cuda::ScanTensor view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

const float* floats(const std::optional<Tensor>& t) { return static_cast<const float*>(data_or_null(t)); }

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

float* floats_to(std::optional<Tensor>& t) { return static_cast<float*>(mutable_data_or_null(t)); }

void ssd_scan_backward_hopper(const Tensor& dy, const std::optional<Tensor>& dfinal_states, const Tensor& x,
                              const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                              const std::optional<Tensor>& D, const std::optional<Tensor>& dt_bias,
                              const std::optional<Tensor>& initial_states, bool dt_softplus, double dt_min,
                              std::optional<double> dt_max, Tensor states, Tensor decays, Tensor head_sums,
                              std::optional<Tensor> parts, Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC,
                              std::optional<Tensor> dD, std::optional<Tensor> ddt_bias,
                              std::optional<Tensor> dinitial) {
  constexpr const char* op = "ssd_scan_backward_hopper";
  const Tensor Ad = as_dtype(A, ScalarType::Float);
  const std::optional<Tensor> Dd = as_dtype(D, ScalarType::Float), bias = as_dtype(dt_bias, ScalarType::Float),
                              initial = as_dtype(initial_states, ScalarType::Float),
                              dfinal = as_dtype(dfinal_states, ScalarType::Float);
  float* const dB_parts = parts ? static_cast<float*>(parts->mutable_data_ptr()) : nullptr;
  const Launch launch(x);
  cuda::ssd_scan_backward_hopper({.dy = view(dy),
                                  .x = view(x),
                                  .B = view(B),
                                  .C = view(C),
                                  .dt = view(dt),
                                  .A = static_cast<const float*>(Ad.const_data_ptr()),
                                  .dt_bias = floats(bias),
                                  .D = floats(Dd),
                                  .initial = floats(initial),
                                  .dfinal = floats(dfinal),
                                  .states = states.mutable_data_ptr(),
                                  .decays = floats(decays),
                                  .head_sums = floats(head_sums),
                                  .dB_parts = dB_parts,
                                  .dC_parts = parts ? dB_parts + parts->stride(0) : nullptr,
                                  .dx = dx.mutable_data_ptr(),
                                  .ddt = ddt.mutable_data_ptr(),
                                  .dB = dB.mutable_data_ptr(),
                                  .dC = dC.mutable_data_ptr(),
                                  .dA = floats(dA),
                                  .ddt_bias = floats_to(ddt_bias),
                                  .dD = floats_to(dD),
                                  .dinitial = floats_to(dinitial),
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
                                  .rows = states.size(1),
                                  .splits = parts ? parts->size(1) : 1},
                                 launch);
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CUDA, m) {
  m.impl("ssd_scan_backward_hopper", TORCH_BOX(&bitkernels::ssd_scan_backward_hopper));
}

#endif
