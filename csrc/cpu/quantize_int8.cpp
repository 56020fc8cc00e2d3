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
float quantize_row(const T* x, int8_t* q, int64_t K) {
  float absmax = 0;
  for (int64_t k = 0; k < K; ++k) absmax = std::max(absmax, std::fabs(static_cast<float>(to_float(x[k]))));
  const float scale = 127.0f / std::max(absmax, 1e-5f);
  for (int64_t k = 0; k < K; ++k) {
    const float v = round_half_even(static_cast<float>(to_float(x[k])) * scale);
    q[k] = static_cast<int8_t>(std::min(std::max(v, -128.0f), 127.0f));
  }
  return scale;
}

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
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(K, 1));
  run(M, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) scale[m] = quantize_int8_row(x, dtype, m, q + m * K, K);
  });
}

}  // namespace bitkernels::cpu
