// ssd_scan_hopper: allocation and launch. Arguments were checked by bitkernels/triton/ssd_scan.py, which calls it.
#include "cuda/ssd_scan_hopper.h"

#include <limits>

#include "op.h"

// Without code for sm_90a it would launch kernels that do nothing.
#ifdef BITKERNELS_SM90A

namespace bitkernels {
namespace {

cuda::ScanTensor view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

const float* floats(const std::optional<Tensor>& t) { return static_cast<const float*>(data_or_null(t)); }

std::tuple<Tensor, Tensor, Tensor> ssd_scan_hopper(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                                   const Tensor& C, const std::optional<Tensor>& D,
                                                   const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
                                                   const std::optional<Tensor>& initial_states, bool dt_softplus,
                                                   double dt_min, std::optional<double> dt_max, int64_t parts,
                                                   double states_cost, int64_t turns, bool squares) {
  constexpr const char* op = "ssd_scan_hopper";
  const Tensor dtd = dt.scalar_type() == ScalarType::Double ? as_dtype(dt, ScalarType::Float) : dt;
  const Tensor Ad = as_dtype(A, ScalarType::Float);
  const std::optional<Tensor> Dd = as_dtype(D, ScalarType::Float), bias = as_dtype(dt_bias, ScalarType::Float),
                              initial = as_dtype(initial_states, ScalarType::Float);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor final_states = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(3), B.size(3)}, ScalarType::Float);
  check_argument(z || !squares, op, ": squares are of gated outputs, and there is no z");
  const int64_t T = squares ? x.size(1) : 0;
  Tensor sums = torch::stable::new_empty(x, {x.size(0), x.size(2), T}, ScalarType::Float);
  const Launch launch(x);
  cuda::ssd_scan_hopper({.x = view(x),
                         .B = view(B),
                         .C = view(C),
                         .z = z ? view(*z) : cuda::ScanTensor{},
                         .dt = view(dtd),
                         .A = static_cast<const float*>(Ad.const_data_ptr()),
                         .D = floats(Dd),
                         .dt_bias = floats(bias),
                         .initial_states = floats(initial),
                         .y = y.mutable_data_ptr(),
                         .final_states = static_cast<float*>(final_states.mutable_data_ptr()),
                         .squares = squares ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr,
                         .dtype = kernel_dtype(op, "x", x.scalar_type()),
                         .dt_dtype = kernel_dtype(op, "dt", dtd.scalar_type()),
                         .D_head = Dd ? Dd->stride(0) : 0,
                         .D_channel = Dd && Dd->dim() == 2 ? Dd->stride(1) : 0,
                         .dt_softplus = dt_softplus,
                         .dt_min = static_cast<float>(dt_min),
                         .dt_max = static_cast<float>(dt_max.value_or(std::numeric_limits<double>::infinity())),
                         .batch = x.size(0),
                         .T = x.size(1),
                         .H = x.size(2),
                         .G = B.size(2),
                         .N = B.size(3),
                         .parts = parts,
                         .turns = turns,
                         .states_cost = states_cost},
                        launch);
  return {y, final_states, sums};
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CUDA, m) { m.impl("ssd_scan_hopper", TORCH_BOX(&bitkernels::ssd_scan_hopper)); }

#endif
