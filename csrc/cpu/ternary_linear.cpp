// ternary_linear and its backward: the lookup matmul, and exact integer sums for int8 activations.
#include <algorithm>
#include <vector>

#include "element.h"
#include "lookup.h"
#include "quantize_int8.h"

namespace bitkernels::cpu {
namespace {

template <typename T>
constexpr T kOne = 1;
template <typename T>
constexpr T kZero = 0;

template <typename T>
void multiply(const void* x, const uint32_t* w, const void* scale, const void* bias, void* y, DType dtype, int64_t M,
              int64_t N, int64_t K, Executor run) {
  lookup_matmul(
      LookupMatmul<T>{
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
      },
      run);
}

void multiply_int8(const TernaryLinear& a, Executor run) {
  const int64_t words = ceil_div(a.K, kTernaryPerWord);
  run(a.M, 1, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> q(words * kTernaryPerWord);
    for (int64_t m = begin; m < end; ++m) {
      const float act_scale = quantize_int8_row(a.x, a.dtype, m, q.data(), a.K);
      visit(a.dtype, [&](auto element) {
        using X = decltype(element);
        const bool wide = sizeof(X) == sizeof(double);
        const auto scalar = [&](const void* p, int64_t i) {
          return wide ? static_cast<float>(static_cast<const double*>(p)[i]) : static_cast<const float*>(p)[i];
        };
        const float scale = scalar(a.scale, 0) / act_scale;
        for (int64_t n = 0; n < a.N; ++n) {
          int32_t sum = 0;
          for (int64_t k = 0; k < a.K; ++k) {
            const uint32_t code = a.w_packed[n * words + k / kTernaryPerWord] >> (2 * (k % kTernaryPerWord)) & 3;
            sum += (static_cast<int32_t>(code) - 1) * q[k];
          }
          float y = static_cast<float>(sum) * scale;
          if (a.bias) y += scalar(a.bias, n);
          from_float(y, static_cast<X*>(a.y)[m * a.N + n]);
        }
      });
    }
  });
}

}  // namespace

int64_t ternary_linear_workspace(const TernaryLinear&) { return 0; }

void ternary_linear(const TernaryLinear& a, Executor run) {
  if (a.int8_activations) return multiply_int8(a, run);
  const auto kernel = a.dtype == DType::kFloat64 ? multiply<double> : multiply<float>;
  kernel(a.x, a.w_packed, a.scale, a.bias, a.y, a.dtype, a.M, a.N, a.K, run);
}

int64_t ternary_linear_backward_workspace(const TernaryLinearBackward& a) {
  return a.K * ceil_div(a.N, kTernaryPerWord) * sizeof(uint32_t);
}

void ternary_linear_backward(const TernaryLinearBackward& a, Executor run) {
  uint32_t* transposed = static_cast<uint32_t*>(a.workspace);
  transpose_packed(Format::kTernary, a.w_packed, transposed, a.N, a.K, run);
  const auto kernel = a.dtype == DType::kFloat64 ? multiply<double> : multiply<float>;
  kernel(a.grad, transposed, a.scale, nullptr, a.dx, a.dtype, a.M, a.K, a.N, run);
}

}  // namespace bitkernels::cpu
