// ssd_scan on CUDA where Hopper's kernel was built: checks, what takes the call, allocation and launch.
#include "cuda/ssd_scan_hopper.h"

#include <array>

#include "cuda_operators.h"
#include "mixer.h"

// Without code for sm_90a it would launch kernels that do nothing.
#ifdef BITKERNELS_SM90A

namespace bitkernels {
namespace {

cuda::ScanTensor view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

const float* floats(const std::optional<Tensor>& t) { return static_cast<const float*>(data_or_null(t)); }

bool on_16_bytes(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

std::tuple<Tensor, Tensor> scan(const char* op, const ScanArguments& a, const cuda::ScanDivision& by,
                                const Launch& launch) {
  const Tensor dt = a.dt.scalar_type() == ScalarType::Double ? as_dtype(a.dt, ScalarType::Float) : a.dt;
  const Tensor A = as_dtype(a.A, ScalarType::Float);
  const std::optional<Tensor> D = as_dtype(a.D, ScalarType::Float), bias = as_dtype(a.dt_bias, ScalarType::Float),
                              initial = as_dtype(a.initial_states, ScalarType::Float);
  const Tensor &x = a.x, &B = a.B;
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor final_states = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(3), B.size(3)}, ScalarType::Float);
  cuda::ssd_scan_hopper({.x = view(x),
                         .B = view(B),
                         .C = view(a.C),
                         .z = a.z ? view(*a.z) : cuda::ScanTensor{},
                         .dt = view(dt),
                         .A = static_cast<const float*>(A.const_data_ptr()),
                         .D = floats(D),
                         .dt_bias = floats(bias),
                         .initial_states = floats(initial),
                         .y = y.mutable_data_ptr(),
                         .final_states = static_cast<float*>(final_states.mutable_data_ptr()),
                         .dtype = kernel_dtype(op, "x", x.scalar_type()),
                         .dt_dtype = kernel_dtype(op, "dt", dt.scalar_type()),
                         .D_head = D ? D->stride(0) : 0,
                         .D_channel = D && D->dim() == 2 ? D->stride(1) : 0,
                         .dt_softplus = a.dt_softplus,
                         .dt_min = static_cast<float>(a.dt_min),
                         .dt_max = static_cast<float>(limit_of(op, a.dt_min, a.dt_max)),
                         .batch = x.size(0),
                         .T = x.size(1),
                         .H = x.size(2),
                         .G = B.size(2),
                         .N = B.size(3),
                         .parts = by.parts,
                         .turns = by.turns,
                         .states_cost = by.states_cost},
                        launch);
  return {y, final_states};
}

// The copy engine reads [B, T, heads, columns] in 16 bits whose rows of columns are dense and on 16-byte boundaries.
// Expanded axes have stride 0, which its maps are not specified for.
bool boxed(const Tensor& t) {
  for (int i = 0; i < 3; ++i) {
    if (t.size(i) > 1 && (t.stride(i) <= 0 || t.stride(i) % 8 != 0)) return false;
  }
  return t.stride(3) == 1 && on_16_bytes(t);
}

// What the kernel knows: 16-bit types, P = 64 and N = 64 or 128, no seq_idx and no cu_seqlens. It walks a head in one
// thread block from beginning to end: with heads for a small part of the GPU in the whole batch, chunks are faster.
cuda::ScanDivision division(const Tensor& x, const Tensor& B, const Tensor& C, const std::optional<Tensor>& z,
                            const std::optional<Tensor>& initial_states, const std::optional<Tensor>& seq_idx,
                            const std::optional<Tensor>& cu_seqlens) {
  const bool known = !seq_idx && !cu_seqlens && x.scalar_type() != ScalarType::Float && x.size(3) == 64 &&
                     (B.size(3) == 64 || B.size(3) == 128) && x.numel() > 0;
  if (!known || !boxed(x) || !boxed(B) || !boxed(C) || (z && !boxed(*z))) return {};
  if (initial_states && !on_16_bytes(*initial_states)) return {};
  return cuda::divide_scan(x.size(0), x.size(1), x.size(2), z.has_value());
}

void check(const char* op, const ScanArguments& a) {
  check_scan(op, a);
  if (a.cu_seqlens) check_cu_seqlens(op, a.x, *a.cu_seqlens);
  check_initial_states(op, a, a.cu_seqlens ? a.cu_seqlens->size(0) - 1 : a.x.size(0));
}

// The same operator in Triton.
std::tuple<Tensor, Tensor> ssd_scan_chunks(const ScanArguments& a) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 15> stack{from(a.x),       from(a.dt),         from(a.A),
                                     from(a.B),       from(a.C),          from(a.D),
                                     from(a.z),       from(a.dt_bias),    from(a.initial_states),
                                     from(a.seq_idx), from(a.cu_seqlens), from(a.dt_softplus),
                                     from(a.dt_min),  from(a.dt_max),     from(a.chunk_size)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("bitkernels::ssd_scan_chunks", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace

std::tuple<Tensor, Tensor> ssd_scan_cuda(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                         const Tensor& C, const std::optional<Tensor>& D,
                                         const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
                                         const std::optional<Tensor>& initial_states,
                                         const std::optional<Tensor>& seq_idx, const std::optional<Tensor>& cu_seqlens,
                                         bool dt_softplus, double dt_min, std::optional<double> dt_max,
                                         int64_t chunk_size) {
  constexpr const char* op = "ssd_scan";
  const ScanArguments a{x,       dt,         A,           B,      C,      D,         z, dt_bias, initial_states,
                        seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, chunk_size};
  check(op, a);
  const Launch launch(x);
  const cuda::ScanDivision by = division(x, B, C, z, initial_states, seq_idx, cu_seqlens);
  if (by.parts == 0) return ssd_scan_chunks(a);
  return scan(op, a, by, launch);
}

namespace {

std::tuple<int64_t, double, int64_t> ssd_scan_division(const Tensor& x, const Tensor& B, const Tensor& C,
                                                       const std::optional<Tensor>& z,
                                                       const std::optional<Tensor>& initial_states,
                                                       const std::optional<Tensor>& seq_idx,
                                                       const std::optional<Tensor>& cu_seqlens) {
  const Launch launch(x);
  const cuda::ScanDivision by = division(x, B, C, z, initial_states, seq_idx, cu_seqlens);
  return {by.parts, by.states_cost, by.turns};
}

std::tuple<Tensor, Tensor> ssd_scan_hopper(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                           const Tensor& C, const std::optional<Tensor>& D,
                                           const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
                                           const std::optional<Tensor>& initial_states, bool dt_softplus, double dt_min,
                                           std::optional<double> dt_max, int64_t parts, double states_cost,
                                           int64_t turns) {
  constexpr const char* op = "ssd_scan_hopper";
  const std::optional<Tensor> none;
  const ScanArguments a{x, dt, A, B, C, D, z, dt_bias, initial_states, none, none, dt_softplus, dt_min, dt_max, 1};
  check(op, a);
  const Launch launch(x);
  check_argument(division(x, B, C, z, initial_states, none, none).parts > 0, op,
                 ": these arguments are not for Hopper's kernel, got x of shape ", shape(x));
  return scan(op, a, {parts, states_cost, turns}, launch);
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CUDA, m) {
  m.impl("ssd_scan", TORCH_BOX(&bitkernels::ssd_scan_cuda));
  m.impl("ssd_scan_division", TORCH_BOX(&bitkernels::ssd_scan_division));
  m.impl("ssd_scan_hopper", TORCH_BOX(&bitkernels::ssd_scan_hopper));
}

#endif
