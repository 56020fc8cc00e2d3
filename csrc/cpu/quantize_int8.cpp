// Per-token int8 activations.
#include "quantize_int8.h"

#include <algorithm>
#include <cmath>

#include "element.h"

namespace bitkernels::cpu {
namespace {

// Rounds half to even where |v| < 2^22, as here: the sum has no bit left for a fraction.
float round_half_even(float v) {
  constexpr float kShift = 0x1.8p23f;
  return (v + kShift) - kShift;
}

template <typename T>
float row_scale(const T* x, int64_t K) {
  float absmax = 0;
  for (int64_t k = 0; k < K; ++k) absmax = std::max(absmax, std::fabs(static_cast<float>(to_float(x[k]))));
  return 127.0f / std::max(absmax, 1e-5f);
}

template <typename T>
float quantized(T v, float scale) {
  return std::min(std::max(round_half_even(static_cast<float>(to_float(v)) * scale), -128.0f), 127.0f);
}

template <typename T>
float quantize_row(const T* x, int8_t* q, int64_t K) {
  const float scale = row_scale(x, K);
  for (int64_t k = 0; k < K; ++k) q[k] = static_cast<int8_t>(quantized(x[k], scale));
  return scale;
}

int64_t rows_at_once(int64_t K) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(K, 1)); }

}  // namespace

float quantize_int8_row(const void* x, DType dtype, int64_t row, int8_t* q, int64_t K) {
  float scale = 0;
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    scale = quantize_row(static_cast<const T*>(x) + row * K, q, K);
  });
  return scale;
}

void quantize_int8(const void* x, DType dtype, int8_t* q, float* scale, int64_t M, int64_t K, Executor run) {
  run(M, rows_at_once(K), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) scale[m] = quantize_int8_row(x, dtype, m, q + m * K, K);
  });
}

void fake_quantize_int8(const void* x, void* y, DType dtype, int64_t M, int64_t K, Executor run) {
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    run(M, rows_at_once(K), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const T* row = static_cast<const T*>(x) + m * K;
        T* out = static_cast<T*>(y) + m * K;
        const float scale = row_scale(row, K);
        for (int64_t k = 0; k < K; ++k) from_float(quantized(row[k], scale) / scale, out[k]);
      }
    });
  });
}

}  // namespace bitkernels::cpu
