// Rows of a lookup matmul for one instruction set: norm and scales before, scales, bias and convolution after.
#pragma once

#include "lookup_rows.h"
#include "mixer_vector.h"

namespace bitkernels::cpu {
namespace {

template <typename T>
inline Vec<T> load(const Scale<T>& scale, int64_t i, int64_t count) {
  return scale.stride == 0 ? splat(scale.values[0]) : load(scale.values + i, count);
}

template <typename X, typename T>
T scale_values(const LookupMatmul<T>& a, const X* x, T* out) {
  T factor = 1;
  if (a.norm_weight) {
    Vec<T> squares{};
    for (int64_t k = 0; k < a.K; k += kLanes<T>) {
      const Vec<T> v = load(x + k, a.K - k);
      squares += v * v;
    }
    factor = T(1) / T(::sqrt(sum_lanes(squares) / T(a.K) + T(a.eps)));
  }
  Vec<T> sums{};
  for (int64_t k = 0; k < a.K; k += kLanes<T>) {
    const int64_t count = a.K - k;
    Vec<T> v = load(x + k, count);
    if (a.norm_weight) v = v * factor * load(a.norm_weight + k, count);
    store(out + k, v * load(a.in_scale, k, count), count);
    sums += v * load(a.in_shift, k, count);
  }
  return sum_lanes(sums);
}

// Calls f with a value of the type of activations, which is T's own where T is double.
template <typename T, typename F>
auto visit_activation(DType dtype, const F& f) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == DType::kBFloat16) return f(BFloat16{});
    if (dtype == DType::kFloat16) return f(Float16{});
  }
  return f(T{});
}

template <typename T>
T scale_row(const LookupMatmul<T>& a, int64_t m, T* out) {
  if (a.wide_x) return scale_values(a, static_cast<const T*>(a.x) + m * a.K, out);
  return visit_activation<T>(
      a.dtype, [&](auto x) { return scale_values(a, static_cast<const decltype(x)*>(a.x) + m * a.K, out); });
}

// States may be narrower than the arithmetic, in fp64 by more than one step.
template <typename T, typename S>
inline Vec<T> load_state(const S* from, int64_t count) {
  if constexpr (std::is_same_v<AccOf<S>, T>) return load(from, count);
  Vec<T> value{};
  for (int64_t i = 0; i < count; ++i) value[i] = load_one(from + i);
  return value;
}

template <typename S, typename V>
inline void store_state(S* to, V value, int64_t count) {
  if constexpr (std::is_same_v<Vec<AccOf<S>>, V>) return store(to, value, count);
  for (int64_t i = 0; i < count; ++i) store(to + i, splat(static_cast<AccOf<S>>(value[i])), 1);
}

// Every other element of two vectors, from the first or the second on.
template <typename T>
inline Vec<T> every_other(Vec<T> a, Vec<T> b, int from) {
  Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>> index;
  for (int i = 0; i < kLanes<T>; ++i) index[i] = 2 * i + from;
  return __builtin_shuffle(a, b, index);
}

// taps[w] of kLanes channels, from [channels, 4]: what nearly all models have.
template <typename T>
inline void load_four_taps(const T* weight, Vec<T> (&taps)[4]) {
  Vec<T> v[4];
  for (int i = 0; i < 4; ++i) v[i] = load(weight + i * kLanes<T>);
  for (int odd = 0; odd < 2; ++odd) {
    const Vec<T> low = every_other<T>(v[0], v[1], odd), high = every_other<T>(v[2], v[3], odd);
    taps[odd] = every_other<T>(low, high, 0);
    taps[odd + 2] = every_other<T>(low, high, 1);
  }
}

// Channels [begin, end) of request m: y[c] becomes their convolution, and the state moves on.
template <typename S, typename E, typename T = AccOf<E>>
void conv_step(const ConvStep& p, int64_t m, int64_t begin, int64_t end, E* y) {
  const int64_t slot = p.state_indices ? p.state_indices[m] : m;
  S* state = slot < 0 ? nullptr : static_cast<S*>(p.state) + slot * p.state_batch;
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t c = begin; c < end; c += kLanes<T>) {
    const int64_t count = end - c < kLanes<T> ? end - c : kLanes<T>;
    const T* weight = static_cast<const T*>(p.weight) + c * p.W;
    const bool four = p.W == 4 && count == kLanes<T>;
    Vec<T> taps[4];
    if (four) load_four_taps(weight, taps);
    Vec<T> sum = bias ? load(bias + c, count) : Vec<T>{};
    for (int64_t w = 0; w < p.W; ++w) {
      Vec<T> input{};
      if (w + 1 == p.W) {
        input = load(y + c, count);
      } else if (state) {
        input = load_state<T>(state + w * p.state_row + c, count);
      }
      if (state && w > 0) store_state(state + (w - 1) * p.state_row + c, input, count);
      if (!four) {
        for (int64_t i = 0; i < kLanes<T>; ++i) taps[0][i] = i < count ? weight[i * p.W + w] : T(0);
      }
      sum += input * taps[four ? w : 0];
    }
    store(y + c, silu(sum), count);
  }
}

// The channels among columns [n0, n0 + columns).
struct Channels {
  int64_t begin, end;
  Channels(const ConvStep& p, int64_t n0, int64_t columns)
      : begin(n0 > p.first ? n0 - p.first : 0),
        end(n0 + columns - p.first < p.channels ? n0 + columns - p.first : p.channels) {}
};

template <typename E, typename T = AccOf<E>>
void conv_columns(const ConvStep& p, int64_t m, int64_t n0, int64_t columns, E* row) {
  const Channels c(p, n0, columns);
  E* y = row + p.first;
  if constexpr (std::is_same_v<T, double>) {
    if (p.state_dtype == DType::kFloat64) return conv_step<double>(p, m, c.begin, c.end, y);
  }
  switch (p.state_dtype) {
    case DType::kBFloat16: return conv_step<BFloat16>(p, m, c.begin, c.end, y);
    case DType::kFloat16: return conv_step<Float16>(p, m, c.begin, c.end, y);
    default: return conv_step<float>(p, m, c.begin, c.end, y);
  }
}

inline void prefetch(const void* from, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

template <typename T>
void expect_row(const LookupMatmul<T>& a, int64_t m, int64_t n0, int64_t columns) {
  if (!a.conv) return;
  const ConvStep& p = *a.conv;
  const Channels c(p, n0, columns);
  const int64_t slot = p.state_indices ? p.state_indices[m] : m;
  const int64_t bytes = p.state_dtype == DType::kFloat64 ? 8 : p.state_dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t w = 0; slot >= 0 && w + 1 < p.W; ++w) {
    const int64_t row = slot * p.state_batch + w * p.state_row;
    prefetch(p.state, (row + c.begin) * bytes, (row + c.end) * bytes);
  }
  constexpr int64_t kBytes = sizeof(T);
  prefetch(p.weight, c.begin * p.W * kBytes, c.end * p.W * kBytes);
  if (p.bias) prefetch(p.bias, c.begin * kBytes, c.end * kBytes);
}

template <typename Y, typename T>
void store_values(const LookupMatmul<T>& a, int64_t n0, int64_t columns, const T* dots, T sum, Y* y) {
  for (int64_t i = 0; i < columns; i += kLanes<T>) {
    const int64_t n = n0 + i, count = columns - i;
    Vec<T> v = load(a.out_scale, n, count) * load(dots + i) + load(a.out_shift, n, count) * sum;
    if (a.bias) v += load(a.bias + n, count);
    if (a.added) v += load(y + n, count);
    store(y + n, v, count);
  }
}

template <typename T>
void store_row(const LookupMatmul<T>& a, int64_t m, int64_t n0, int64_t columns, const T* dots, T sum) {
  if (a.added) return store_values(a, n0, columns, dots, sum, static_cast<T*>(a.y) + m * a.N);
  visit_activation<T>(a.dtype, [&](auto y) {
    decltype(y)* row = static_cast<decltype(y)*>(a.y) + m * a.N;
    store_values(a, n0, columns, dots, sum, row);
    if (a.conv) conv_columns(*a.conv, m, n0, columns, row);
  });
}

template <typename T>
constexpr RowKernels<T> kRowKernels{scale_row<T>, expect_row<T>, store_row<T>};

}  // namespace
}  // namespace bitkernels::cpu
