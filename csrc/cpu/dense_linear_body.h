// Products of a few tokens with a large matrix, for one instruction set: the matrix is read once, front to back.
#pragma once

#include "mixer_vector.h"

namespace bitkernels::cpu {
namespace {

// Rows of the matrix and tokens whose sums are in registers at once.
constexpr int kDenseRows = 4, kDenseTokens = 4;
constexpr int64_t kLine = 64;

// Adds kLanes<T> columns from k, or the last ones. Unrolled by pragma, or gcc keeps the sums in memory.
template <bool kWhole, int kRows, int kTokens, typename W, typename T>
[[gnu::always_inline]] inline void dense_add(const W* weight, const T* x, int64_t K, int64_t k,
                                             Vec<T> (&sum)[kRows][kTokens]) {
  const int64_t count = kWhole ? kLanes<T> : K - k;
  Vec<T> w[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) w[r] = load(weight + r * K + k, count);
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    const Vec<T> v = load(x + t * K + k, count);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r][t] += w[r] * v;
  }
}

// x is [tokens, K] in the arithmetic's type. Every sum is made in the same order, however many there are.
template <int kRows, int kTokens, typename W, typename T>
void dense_block(const W* weight, const T* x, int64_t K, T (&sums)[kDenseRows][kDenseTokens]) {
  Vec<T> sum[kRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[r][t] = Vec<T>{};
  }
  // Meanwhile memory is asked for the next rows, front to back: several rows at once are nothing the hardware foresees.
  const char* next = reinterpret_cast<const char*>(weight + kRows * K);
  constexpr int64_t kBytes = kRows * kLanes<T> * sizeof(W);
  int64_t k = 0;
  for (; k + kLanes<T> <= K; k += kLanes<T>, next += kBytes) {
    for (int64_t i = 0; i < kBytes; i += kLine) __builtin_prefetch(next + i, 0, 2);
    dense_add<true>(weight, x, K, k, sum);
  }
  if (k < K) dense_add<false>(weight, x, K, k, sum);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sums[r][t] = sum_lanes(sum[r][t]);
  }
}

template <int kRows, typename W, typename T>
void dense_tokens(const W* weight, const T* x, int64_t K, int64_t tokens, T (&sums)[kDenseRows][kDenseTokens]) {
  switch (tokens) {
    case 1: return dense_block<kRows, 1>(weight, x, K, sums);
    case 2: return dense_block<kRows, 2>(weight, x, K, sums);
    case 3: return dense_block<kRows, 3>(weight, x, K, sums);
    default: return dense_block<kRows, kDenseTokens>(weight, x, K, sums);
  }
}

// Columns [begin, end) of y; `wide` is x in the arithmetic's type.
template <typename W, typename E, typename T = AccOf<E>>
void dense_columns_of(const DenseLinear& p, int64_t begin, int64_t end, const T* wide) {
  const T* scale = static_cast<const T*>(p.scale);
  for (int64_t n = begin; n < end;) {
    const bool whole = n + kDenseRows <= end;
    const W* weight = static_cast<const W*>(p.weight) + n * p.K;
    for (int64_t m = 0; m < p.M; m += kDenseTokens) {
      const int64_t tokens = p.M - m < kDenseTokens ? p.M - m : kDenseTokens;
      T sums[kDenseRows][kDenseTokens];
      whole ? dense_tokens<kDenseRows>(weight, wide + m * p.K, p.K, tokens, sums)
            : dense_tokens<1>(weight, wide + m * p.K, p.K, tokens, sums);
      for (int r = 0; r < (whole ? kDenseRows : 1); ++r) {
        for (int64_t t = 0; t < tokens; ++t) {
          const T value = scale ? sums[r][t] * scale[n + r] : sums[r][t];
          store(static_cast<E*>(p.y) + (m + t) * p.N + n + r, splat(value), 1);
        }
      }
    }
    n += whole ? kDenseRows : 1;
  }
}

template <typename E>
void dense_columns(const DenseLinear& p, int64_t begin, int64_t end, void* scratch) {
  using T = AccOf<E>;
  T* wide = static_cast<T*>(scratch);
  for (int64_t i = 0; i < p.M * p.K; i += kLanes<T>) {
    const int64_t count = p.M * p.K - i;
    store(wide + i, load(static_cast<const E*>(p.x) + i, count), count);
  }
  if constexpr (std::is_same_v<T, double>) {
    dense_columns_of<double, E>(p, begin, end, wide);
  } else {
    switch (p.weight_dtype) {
      case DType::kInt8: return dense_columns_of<int8_t, E>(p, begin, end, wide);
      case DType::kBFloat16: return dense_columns_of<BFloat16, E>(p, begin, end, wide);
      case DType::kFloat16: return dense_columns_of<Float16, E>(p, begin, end, wide);
      default: return dense_columns_of<float, E>(p, begin, end, wide);
    }
  }
}

}  // namespace
}  // namespace bitkernels::cpu
