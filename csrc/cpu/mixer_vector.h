// Vectors of the instruction set a file is compiled for: loads, stores, exp, a small matrix product.
//
// Everything has internal linkage, because each instruction set compiles its own version. For the
// same reason the files that include this one keep to plain loops: an inline function of the standard
// library could be merged across files and run where its instructions do not exist.
#pragma once

#include <math.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <type_traits>

#include "../kernels.h"

namespace bitkernels::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
// A block of the matrix product: rows by vectors, all of it in registers.
constexpr int kBlockRows = 4, kBlockVectors = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kBlockRows = 4, kBlockVectors = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kBlockRows = 4, kBlockVectors = 2;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

using VecI = Vec<int32_t>;
using VecU = Vec<uint32_t>;
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));
typedef int8_t VecI8 __attribute__((vector_size(kVectorBytes / 4)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type of the arithmetic on elements of type E.
template <typename E>
using AccOf = std::conditional_t<std::is_same_v<E, double>, double, float>;

template <typename To, typename From>
inline To as_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};  // not a sum, which would turn -0 into +0
}

// gcc makes five instructions of a conversion to twice the width.
inline VecU widen_bits(VecU16 bits) {
#if defined(__AVX512F__)
  return as_bits<VecU>(_mm512_cvtepu16_epi32(as_bits<__m256i>(bits)));
#elif defined(__AVX2__)
  return as_bits<VecU>(_mm256_cvtepu16_epi32(as_bits<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, VecU);
#endif
}

inline VecU16 narrow_bits(VecU bits) {
#if defined(__AVX512F__)
  return as_bits<VecU16>(_mm512_cvtepi32_epi16(as_bits<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, VecU16);
#endif
}

inline Vec<float> widen(VecI8 value) {
#if defined(__AVX512F__)
  return as_bits<Vec<float>>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(as_bits<__m128i>(value))));
#else
  return __builtin_convertvector(__builtin_convertvector(value, VecI), Vec<float>);
#endif
}

inline Vec<float> widen(BFloat16, VecU16 bits) { return as_bits<Vec<float>>(widen_bits(bits) << 16); }

inline VecU16 narrow(BFloat16, Vec<float> value) {
  const VecU bits = as_bits<VecU>(value);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return narrow_bits(value == value ? rounded : (bits >> 16) | 0x40u);
}

inline Vec<float> widen(Float16, VecU16 half) {
  const VecU bits = widen_bits(half);
  const VecU magnitude = (bits & 0x7fffu) << 13;
  // 2^112 moves the exponent bias from 15 to 127 and normalises subnormal numbers.
  const VecU finite = as_bits<VecU>(as_bits<Vec<float>>(magnitude) * 0x1p112f);
  const VecU special = magnitude | 0x7f800000u;
  return as_bits<Vec<float>>((magnitude >= 0x0f800000u ? special : finite) | (bits & 0x8000u) << 16);
}

inline VecU16 narrow(Float16, Vec<float> value) {
  const VecU bits = as_bits<VecU>(value);
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 rounds to a multiple of 2^-24, the spacing of subnormal halves.
  const VecU subnormal = as_bits<VecU>(as_bits<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const VecU special = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : VecU{} + 0x7c00u;
  const VecU result = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
  return narrow_bits(result | (bits & 0x80000000u) >> 16);
}

template <typename E>
inline Vec<AccOf<E>> load(const E* from) {
  if constexpr (sizeof(E) == 2) {
    VecU16 bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return widen(E{}, bits);
  } else if constexpr (sizeof(E) == 1) {
    VecI8 value;
    __builtin_memcpy(&value, from, sizeof(value));
    return widen(value);
  } else {
    Vec<E> value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }
}

template <typename E>
inline void store(E* to, Vec<AccOf<E>> value) {
  if constexpr (sizeof(E) == 2) {
    const VecU16 bits = narrow(E{}, value);
    __builtin_memcpy(to, &bits, sizeof(bits));
  } else {
    __builtin_memcpy(to, &value, sizeof(value));
  }
}

// The first `count` lanes; the others are zero.
template <typename E>
inline Vec<AccOf<E>> load(const E* from, int64_t count) {
  constexpr int lanes = kLanes<AccOf<E>>;
  if (count >= lanes) return load(from);
  E buffer[lanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
}

template <typename E>
inline void store(E* to, Vec<AccOf<E>> value, int64_t count) {
  constexpr int lanes = kLanes<AccOf<E>>;
  if (count >= lanes) return store(to, value);
  E buffer[lanes];
  store(buffer, value);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

template <typename E>
inline AccOf<E> load_one(const E* from) {
  return load(from, 1)[0];
}

// Halves onto halves, in registers: an array of lanes would pass through memory at every step.
template <typename V>
inline auto sum_lanes(V value) {
  using T = std::remove_cvref_t<decltype(value[0])>;
  if constexpr (sizeof(V) == sizeof(T)) {
    return value[0];
  } else {
    typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    __builtin_memcpy(halves, &value, sizeof(value));
    return sum_lanes(halves[0] + halves[1]);
  }
}

// Zero below the smallest normal number, so that no later product is slowed by subnormal ones.
inline Vec<float> exp(Vec<float> x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> clipped = x > 88.0f ? splat(88.0f) : (x < -87.3f ? splat(-87.3f) : x);
  const Vec<float> shifted = clipped * 1.44269504f + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecI exponent = (as_bits<VecI>(shifted) - (as_bits<int32_t>(kRound) - 127)) << 23;
  return x < -87.3f ? Vec<float>{} : p * as_bits<Vec<float>>(exponent);
}

// log(1 + e) for e in [0, 2^100].
inline Vec<float> log1p(Vec<float> e) {
  const Vec<float> u = e + 1.0f;
  const VecI bits = as_bits<VecI>(u);
  const VecI exponent = (bits - 0x3f3504f3) >> 23;  // of u / sqrt(1/2): the mantissa lies in [0.707, 1.414)
  const Vec<float> m = as_bits<Vec<float>>(bits - (exponent << 23)) - 1.0f;
  const Vec<float> n = __builtin_convertvector(exponent, Vec<float>);
  Vec<float> p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vec<float> square = m * m;
  const Vec<float> log = (m + (p * m * square - n * 2.12194440e-4f - square * 0.5f)) + n * 0.693359375f;
  // The factor undoes the rounding of 1 + e.
  return u == 1.0f ? e : log * (e / (u - 1.0f));
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

inline Vec<double> log1p(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::log1p(x[i]);
  return x;
}

template <typename V>
inline V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

template <typename V>
inline V silu(V x) {
  return x * sigmoid(x);
}

// d silu(x) / dx, given sigmoid(x).
template <typename V>
inline V silu_slope(V x, V sigmoid_x) {
  return sigmoid_x * (1 + x * (1 - sigmoid_x));
}

// x + dt_bias, softplus, clamp; `slope` is the derivative of the result.
template <typename T>
inline Vec<T> time_step(Vec<T> raw, bool softplus, T low, T high, Vec<T>& slope) {
  Vec<T> dt = raw;
  slope = splat(T(1));
  if (softplus) {
    const Vec<T> clipped = raw > T(20) ? splat(T(20)) : raw;
    const auto linear = raw > T(20);
    dt = linear ? raw : log1p(exp(clipped));
    slope = linear ? slope : sigmoid(raw);
  }
  slope = dt < low ? Vec<T>{} : (dt > high ? Vec<T>{} : slope);
  return dt < low ? splat(low) : (dt > high ? splat(high) : dt);
}

template <typename T, int R, int V>
inline void multiply_block(const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, T* c, int64_t c_row,
                           int64_t K, T beta) {
  Vec<T> sum[R][V] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> right[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) right[v] = load(b + k * b_row + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> left = splat(a[r * a_row + k * a_col]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      T* to = c + r * c_row + v * kLanes<T>;
      store(to, beta == T(0) ? sum[r][v] : sum[r][v] + load(to) * beta);
    }
  }
}

template <typename T>
struct Matrix {
  const T* data;
  int64_t row, col;
};

enum class Shape { kFull, kLower, kUpper };

// c[M, cols] = beta * c + a[M, K] @ b[K, cols]. `cols` is a multiple of the vector, rows of b and c are
// contiguous, a is anything. A lower (upper) triangular a is not read above (below) its diagonal blocks.
template <typename T, int V>
inline void multiply_columns(Matrix<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t M, int64_t K, T beta,
                             Shape shape) {
  int64_t m = 0;
  auto rows = [&](auto count) {
    constexpr int R = decltype(count)::value;
    const int64_t begin = shape == Shape::kUpper ? m : 0;
    const int64_t end = shape == Shape::kLower && m + R < K ? m + R : K;
    multiply_block<T, R, V>(a.data + m * a.row + begin * a.col, a.row, a.col, b + begin * b_row, b_row, c + m * c_row,
                            c_row, end - begin, beta);
    m += R;
  };
  // Fewer vectors leave registers for more rows.
  constexpr int tall = kBlockRows * kBlockVectors / V;
  while (m + tall <= M) rows(std::integral_constant<int, tall>{});
  if constexpr (tall > kBlockRows) {
    while (m + kBlockRows <= M) rows(std::integral_constant<int, kBlockRows>{});
  }
  while (m < M) rows(std::integral_constant<int, 1>{});
}

template <typename T>
inline void multiply(Matrix<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t M, int64_t cols, int64_t K,
                     T beta, Shape shape = Shape::kFull) {
  int64_t col = 0;
  for (; col + kBlockVectors * kLanes<T> <= cols; col += kBlockVectors * kLanes<T>) {
    multiply_columns<T, kBlockVectors>(a, b + col, b_row, c + col, c_row, M, K, beta, shape);
  }
  if constexpr (kBlockVectors > 2) {
    if (col + 2 * kLanes<T> <= cols) {
      multiply_columns<T, 2>(a, b + col, b_row, c + col, c_row, M, K, beta, shape);
      col += 2 * kLanes<T>;
    }
  }
  for (; col < cols; col += kLanes<T>) {
    multiply_columns<T, 1>(a, b + col, b_row, c + col, c_row, M, K, beta, shape);
  }
}

}  // namespace
}  // namespace bitkernels::cpu
