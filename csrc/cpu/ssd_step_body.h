// One token of the scan for one instruction set: reads and writes each state once.
#pragma once

#include "stochastic_round.h"

namespace bitkernels::cpu {
namespace {

// Rows and elements of a state that are worked on at once: B and C of a tile stay in registers for all of its rows.
constexpr int64_t kStepRows = 64;
constexpr int kStepVectors = 8;
// Rows whose random bits are drawn together.
constexpr int kDrawnRows = 2;

// One tile: elements [n0, n0 + kStepVectors * kLanes) of each row of h. Adds C h of each row to sums.
template <bool kRandom, bool kWhole, typename E, typename S, typename T = AccOf<E>>
void step_tile(S* h, int64_t stride, int64_t rows, int64_t first_row, int64_t n0, int64_t N, T decay, const T* scaled,
               const E* B, const E* C, const RandomBits& random, T* sums) {
  constexpr int kN = kLanes<T>;
  Vec<T> b[kStepVectors], c[kStepVectors];
  for (int v = 0; v < kStepVectors; ++v) {
    b[v] = load(B + n0 + v * kN, N - n0 - v * kN);
    c[v] = load(C + n0 + v * kN, N - n0 - v * kN);
  }
  uint16_t bits[kRandom ? kDrawnRows : 1][RandomBits::kElements];
  for (int64_t i = 0; i < rows; ++i) {
    S* row = h + i * stride + n0;
    if constexpr (kRandom) {
      if (i % kDrawnRows == 0) random.fill(bits, first_row + i, n0);
    }
    const uint16_t* drawn = bits[kRandom ? i % kDrawnRows : 0];
    const auto step = [&](int v, int64_t left) { return load(row + v * kN, left) * decay + b[v] * scaled[i]; };
    const auto put = [&](int v, Vec<T> value, int64_t left) {
      if constexpr (kRandom) {
        store_randomly(row + v * kN, value, drawn + v * kN, left);
      } else {
        store(row + v * kN, value, left);
      }
    };
    Vec<T> sum{};
    for (int v = 0; v < kStepVectors; v += 2) {
      const int64_t left = kWhole ? 2 * kN : N - n0 - v * kN;
      if (left <= 0) break;
      const Vec<T> first = step(v, left);
      sum += first * c[v];
      if (left <= kN) {
        put(v, first, left);
        break;
      }
      const Vec<T> second = step(v + 1, left - kN);
      sum += second * c[v + 1];
      if constexpr (kRandom && kWhole) {
        store_randomly(row + v * kN, first, second, drawn + v * kN);
      } else {
        put(v, first, left);
        put(v + 1, second, left - kN);
      }
    }
    sums[i] += sum_lanes(sum);
  }
}

template <typename E, typename S>
void step_head(const SsdStep& p, int64_t batch, int64_t head) {
  using T = AccOf<E>;
  const int64_t group = head / (p.H / p.G);
  auto view = [&](const Strided& v, int64_t h, auto element) {
    return static_cast<const decltype(element)*>(v.data) + batch * v.batch + h * v.head;
  };
  const E* x = view(p.x, head, E{});
  const E* B = view(p.B, group, E{});
  const E* C = view(p.C, group, E{});
  const E* z = p.z.data ? view(p.z, head, E{}) : nullptr;
  const T* D = static_cast<const T*>(p.D);
  T raw = p.dt_bias ? static_cast<const T*>(p.dt_bias)[head] : T(0);
  switch (p.dt_dtype) {
    case DType::kBFloat16: raw += load_one(view(p.dt, head, BFloat16{})); break;
    case DType::kFloat16: raw += load_one(view(p.dt, head, Float16{})); break;
    case DType::kFloat64: raw += static_cast<T>(*view(p.dt, head, double{})); break;
    default: raw += *view(p.dt, head, float{});
  }
  Vec<T> slope;
  const Vec<T> dt = time_step(splat(raw), p.dt_softplus, T(p.dt_min), T(p.dt_max), slope);
  const T decay = exp(dt * static_cast<const T*>(p.A)[head])[0];
  const int64_t slot = p.state_indices ? p.state_indices[batch] : batch;
  E* y = static_cast<E*>(p.y) + (batch * p.H + head) * p.P;
  if (slot < 0) {
    for (int64_t i = 0; i < p.P; ++i) y[i] = E{};
    return;
  }
  S* state = static_cast<S*>(p.state) + slot * p.state_batch + head * p.state_head;

  const RandomBits random(p.seed ? static_cast<uint64_t>(p.seed[batch]) : 0,
                          p.seed ? static_cast<uint64_t>(p.position[batch]) : 0);
  constexpr int64_t kTile = kStepVectors * kLanes<T>;

  for (int64_t i0 = 0; i0 < p.P; i0 += kStepRows) {
    const int64_t rows = p.P - i0 < kStepRows ? p.P - i0 : kStepRows;
    T scaled[kStepRows], sums[kStepRows] = {};
    for (int64_t i = 0; i < rows; i += kLanes<T>) {
      store(scaled + i, dt * load(x + i0 + i, rows - i));
    }
    for (int64_t n = 0; n < p.N; n += kTile) {
      const auto step = [&](auto randomly, auto whole) {
        step_tile<randomly && sizeof(S) == 2, whole>(state + i0 * p.state_row, p.state_row, rows, head * p.P + i0, n,
                                                     p.N, decay, scaled, B, C, random, sums);
      };
      const bool whole = n + kTile <= p.N;
      if (p.seed) {
        whole ? step(std::true_type{}, std::true_type{}) : step(std::true_type{}, std::false_type{});
      } else {
        whole ? step(std::false_type{}, std::true_type{}) : step(std::false_type{}, std::false_type{});
      }
    }
    for (int64_t i = 0; i < rows; i += kLanes<T>) {
      const int64_t left = rows - i, row = i0 + i;
      Vec<T> out = load(sums + i);
      if (D) out += (p.D_per_channel ? load(D + head * p.P + row, left) : splat(D[head])) * load(x + row, left);
      if (z) out *= silu(load(z + row, left));
      store(y + row, out, left);
    }
  }
}

}  // namespace
}  // namespace bitkernels::cpu
