// One token of the scan for one instruction set: reads and writes each state once.
#pragma once

#include "stochastic_round.h"

namespace bitkernels::cpu {
namespace {

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
  const T raw = *view(p.dt, head, T{}) + (p.dt_bias ? static_cast<const T*>(p.dt_bias)[head] : T(0));
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
  RandomBits random{};
  if (p.seed) random = {static_cast<uint64_t>(p.seed[batch]), static_cast<uint64_t>(p.position[batch])};

  for (int64_t i = 0; i < p.P; ++i) {
    S* h = state + i * p.state_row;
    const T value = load_one(x + i);
    const T scaled = dt[0] * value;
    Vec<T> sum{};
    uint16_t bits[8 * kLanes<float>];
    for (int64_t n = 0; n < p.N; n += kLanes<T>) {
      const Vec<T> next = load(h + n, p.N - n) * decay + load(B + n, p.N - n) * scaled;
      if constexpr (sizeof(S) == 2) {
        const int64_t offset = n % (8 * kLanes<float>);
        if (p.seed && offset == 0) random.fill(bits, head * p.P + i, n);
        if (p.seed) {
          store_randomly(h + n, next, bits + offset, p.N - n);
        } else {
          store(h + n, next, p.N - n);
        }
      } else {
        store(h + n, next, p.N - n);
      }
      sum += next * load(C + n, p.N - n);
    }
    T out = sum_lanes(sum);
    if (p.D) out += static_cast<const T*>(p.D)[p.D_per_channel ? head * p.P + i : head] * value;
    if (z) out *= silu(splat(load_one(z + i)))[0];
    store(y + i, splat(out), 1);
  }
}

}  // namespace
}  // namespace bitkernels::cpu
