// One token of the scan for one instruction set: reads and writes each state once.
#pragma once

#include "mixer_vector.h"

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
  S* state = static_cast<S*>(p.state) + batch * p.state_batch + head * p.state_head;
  E* y = static_cast<E*>(p.y) + (batch * p.H + head) * p.P;

  for (int64_t i = 0; i < p.P; ++i) {
    S* h = state + i * p.state_row;
    const T value = load_one(x + i);
    const T scaled = dt[0] * value;
    Vec<T> sum{};
    for (int64_t n = 0; n < p.N; n += kLanes<T>) {
      const Vec<T> next = load(h + n, p.N - n) * decay + load(B + n, p.N - n) * scaled;
      store(h + n, next, p.N - n);
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
