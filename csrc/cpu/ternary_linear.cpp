// ternary_linear and its backward on the lookup matmul.
#include "lookup.h"
#include "ternary_int8.h"

namespace bitkernels::cpu {
namespace {

template <typename T>
constexpr T kOne = 1;
template <typename T>
constexpr T kZero = 0;

template <typename T>
LookupMatmul<T> matmul(const void* x, const uint32_t* w, const void* scale, const void* bias, void* y, DType dtype,
                       int64_t M, int64_t N, int64_t K) {
  return {
      .x = x,
      .w = w,
      .y = y,
      .dtype = dtype,
      .format = Format::kTernary,
      .in_scale = {&kOne<T>, 0},
      .in_shift = {&kZero<T>, 0},
      .out_scale = {static_cast<const T*>(scale), 0},
      .out_shift = {&kZero<T>, 0},
      .bias = static_cast<const T*>(bias),
      .M = M,
      .N = N,
      .K = K,
      .left = nullptr,
      .left_dots = nullptr,
      .left_sums = nullptr,
  };
}

template <typename T>
LookupMatmul<T> forward(const TernaryLinear& a) {
  return matmul<T>(a.x, a.w_packed, a.scale, a.bias, a.y, a.dtype, a.M, a.N, a.K);
}

}  // namespace

int64_t ternary_linear_workspace(const TernaryLinear&) { return 0; }

void ternary_linear(const TernaryLinear& a, Executor run) {
  if (a.int8_activations) return ternary_linear_int8(a, run);
  a.dtype == DType::kFloat64 ? lookup_matmul(forward<double>(a), run) : lookup_matmul(forward<float>(a), run);
}

std::string explain(const TernaryLinear& a) {
  if (a.int8_activations) return explain_ternary_int8(a);
  return a.dtype == DType::kFloat64 ? explain_lookup(forward<double>(a)) : explain_lookup(forward<float>(a));
}

int64_t ternary_linear_backward_workspace(const TernaryLinearBackward& a) {
  return a.K * ceil_div(a.N, kTernaryPerWord) * sizeof(uint32_t);
}

void ternary_linear_backward(const TernaryLinearBackward& a, Executor run) {
  uint32_t* transposed = static_cast<uint32_t*>(a.workspace);
  transpose_packed(Format::kTernary, a.w_packed, transposed, a.N, a.K, run);
  const auto run_as = [&](auto t) {
    lookup_matmul(matmul<decltype(t)>(a.grad, transposed, a.scale, nullptr, a.dx, a.dtype, a.M, a.K, a.N), run);
  };
  a.dtype == DType::kFloat64 ? run_as(double()) : run_as(float());
}

}  // namespace bitkernels::cpu
