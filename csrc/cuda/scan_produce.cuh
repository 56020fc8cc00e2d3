// The warps of the scan that fetch: one asks the copy engine for x, B and C, two turn dt into decays.
#pragma once

#include "scan_layout.cuh"

namespace bitkernels::cuda {

template <int N>
__device__ void produce_tiles(const ScanPlace<N>& at, int blocks, const CUtensorMap& x, const CUtensorMap& B,
                              const CUtensorMap& C) {
  using Place = ScanPlace<N>;
  for (int b = 0; b < blocks; ++b) {
    at.wait_empty(b);
    const SharedAddress stage = at.stage(b);
    const SharedAddress full = at.full + b % kScanStages * 8;
    const int token = b * kScanTokens;
    barrier_arrive_expecting(full, Place::kStageBytes);
    load_tokens(&x, stage, full, 0, at.head, token, at.row);
#pragma unroll
    for (int i = 0; i < Place::kBoxes; ++i) {
      load_tokens(&B, stage + Place::kB + i * kScanBoxBytes, full, 64 * i, at.group, token, at.row);
    }
#pragma unroll
    for (int i = 0; i < Place::kBoxes; ++i) {
      load_tokens(&C, stage + Place::kC + i * kScanBoxBytes, full, 64 * i, at.group, token, at.row);
    }
  }
}

__device__ inline float step_size(float v, const ScanProblem& p) {
  if (p.dt_softplus) v = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
  return v < p.dt_min ? p.dt_min : v > p.dt_max ? p.dt_max : v;  // NaN stays
}

// Warp `warp` of kDecayWarps takes every kDecayWarps-th block; a lane has two neighbouring tokens.
template <int N>
__device__ void produce_decays(const ScanPlace<N>& at, const ScanProblem& p, int warp, int lane) {
  // A warp must wait for every phase of the barriers it waits for.
  static_assert(kScanStages % kDecayWarps == 0);
  constexpr float kLog2E = 1.4426950408889634f;
  const float A = p.A[at.head] * kLog2E;
  const float bias = p.dt_bias ? p.dt_bias[at.head] : 0.0f;
  // As bits: to convert them would be to wait for them.
  const int64_t first = at.row * p.dt_batch + at.head * p.dt_head;
  const bool wide = p.dt_dtype == DType::kFloat32;
  const auto fetch = [&](int b, uint32_t (&bits)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = min(b * kScanTokens + 2 * lane + i, p.T - 1);
      const int64_t at = first + t * p.dt_time;
      bits[i] = wide ? static_cast<const uint32_t*>(p.dt)[at] : static_cast<const uint16_t*>(p.dt)[at];
    }
  };
  const auto value = [&](uint32_t bits) {
    if (wide) return __uint_as_float(bits);
    if (p.dt_dtype == DType::kBFloat16) return __uint_as_float(bits << 16);
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  };
  uint32_t next[2];
  fetch(warp, next);
  for (int b = warp; b < p.blocks; b += kDecayWarps) {
    const float v[2] = {value(next[0]), value(next[1])};
    fetch(b + kDecayWarps, next);
    const int left = p.T - b * kScanTokens - 2 * lane;
    const float step[2] = {left > 0 ? step_size(v[0] + bias, p) : 0.0f, left > 1 ? step_size(v[1] + bias, p) : 0.0f};
    const float own = step[0] * A + step[1] * A;
    float total = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const float before = __shfl_up_sync(0xffffffff, total, distance);
      if (lane >= distance) total += before;
    }
    const float end = __shfl_sync(0xffffffff, total, 31);
    const float totals[2] = {total - step[1] * A, total};
    at.wait_empty(b);
    ScanDecays& to = at.decays[b % kScanStages];
    to.pairs[lane] = {totals[0], totals[1], step[0], step[1]};
    reinterpret_cast<float2*>(to.enter)[lane] = {exp2_fast(totals[0]), exp2_fast(totals[1])};
    reinterpret_cast<float2*>(to.leave)[lane] = {exp2_fast(end - totals[0]) * step[0],
                                                 exp2_fast(end - totals[1]) * step[1]};
    if (lane == 0) to.kept = exp2_fast(end);
    __syncwarp();
    if (lane == 0) barrier_arrive(at.full + b % kScanStages * 8);
  }
}

}  // namespace bitkernels::cuda
