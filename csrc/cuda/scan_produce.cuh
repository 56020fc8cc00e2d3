// The warps of the scan that fetch: one asks the copy engine for x, B and C, two turn dt into decays.
#pragma once

#include "scan_layout.cuh"

namespace bitkernels::cuda {

template <int N>
__device__ void produce_tiles(const ScanPlace<N>& at, const CUtensorMap& x, const CUtensorMap& B,
                              const CUtensorMap& C) {
  using Place = ScanPlace<N>;
  for (int b = 0; b < at.end; ++b) {
    at.wait_empty(b);
    const SharedAddress stage = at.stage(b);
    const SharedAddress full = at.full + b % kScanStages * 8;
    const int token = b * kScanTokens;
    barrier_arrive_expecting(full, b < at.begin ? Place::kC : Place::kStageBytes);
    load_tokens(&x, stage, full, 0, at.head, token, at.row);
#pragma unroll
    for (int i = 0; i < Place::kBoxes; ++i) {
      load_tokens(&B, stage + Place::kB + i * kScanBoxBytes, full, 64 * i, at.group, token, at.row);
    }
    if (b < at.begin) continue;
#pragma unroll
    for (int i = 0; i < Place::kBoxes; ++i) {
      load_tokens(&C, stage + Place::kC + i * kScanBoxBytes, full, 64 * i, at.group, token, at.row);
    }
  }
}

// Into the places of the outputs of three blocks before.
template <int N>
__device__ void produce_gates(const ScanPlace<N>& at, const CUtensorMap& z) {
  for (int b = at.begin; b < at.end; ++b) {
    const int box = at.gate_box(b);
    const SharedAddress full = at.gate_barrier(b);
    barrier_wait(at.left + box * 8, (b - at.begin) / kGateBoxes % 2 ^ 1);
    barrier_arrive_expecting(full, kScanBoxBytes);
    load_tokens(&z, at.outputs + box * kScanBoxBytes, full, 0, at.head, b * kScanTokens, at.row);
  }
}

__device__ inline float soft_plus(float v) { return fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v))); }

__device__ inline float clamp_step(float v, float low, float high) {
  return v < low ? low : v > high ? high : v;  // NaN stays
}

// dt of two neighbouring tokens of a head, from `token` on, for every lane of a warp, as bits: to convert them would be
// to wait for them.
struct StepReader {
  const void* dt;
  int64_t first, stride;
  int T;
  DType dtype;

  __device__ void fetch(int token, int lane, uint32_t (&bits)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = min(token + 2 * lane + i, T - 1);
      const int64_t at = first + t * stride;
      bits[i] = dtype == DType::kFloat32 ? static_cast<const uint32_t*>(dt)[at] : static_cast<const uint16_t*>(dt)[at];
    }
  }
  __device__ float value(uint32_t bits) const {
    if (dtype == DType::kFloat32) return __uint_as_float(bits);
    if (dtype == DType::kBFloat16) return __uint_as_float(bits << 16);
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  }
};

// Running sums over the tokens of a warp, two a lane; `end` is the last.
__device__ inline float2 running_sums(float first, float second, int lane, float& end) {
  float total = first + second;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float before = __shfl_up_sync(0xffffffff, total, distance);
    if (lane >= distance) total += before;
  }
  end = __shfl_sync(0xffffffff, total, 31);
  return {total - second, total};
}

// Warp `warp` of kDecayWarps takes every kDecayWarps-th block; a lane has two neighbouring tokens.
template <int N>
__device__ void produce_decays(const ScanPlace<N>& at, const ScanProblem& p, int warp, int lane) {
  // A warp must wait for every phase of the barriers it waits for.
  static_assert(kScanStages % kDecayWarps == 0);
  const float A = p.A[at.head] * kLog2E;
  const float bias = p.dt_bias ? p.dt_bias[at.head] : 0.0f;
  const StepReader reader{p.dt, at.row * p.dt_batch + at.head * p.dt_head, p.dt_time, p.T, p.dt_dtype};
  const auto step_size = [&](float v) { return clamp_step(p.dt_softplus ? soft_plus(v) : v, p.dt_min, p.dt_max); };
  uint32_t next[2];
  reader.fetch(warp * kScanTokens, lane, next);
  for (int b = warp; b < at.end; b += kDecayWarps) {
    const float v[2] = {reader.value(next[0]), reader.value(next[1])};
    reader.fetch((b + kDecayWarps) * kScanTokens, lane, next);
    const int left = p.T - b * kScanTokens - 2 * lane;
    const float step[2] = {left > 0 ? step_size(v[0] + bias) : 0.0f, left > 1 ? step_size(v[1] + bias) : 0.0f};
    float end;
    const float2 totals = running_sums(step[0] * A, step[1] * A, lane, end);
    at.wait_empty(b);
    ScanDecays& to = at.decays[b % kScanStages];
    to.pairs[lane] = {totals.x, totals.y, step[0], step[1]};
    reinterpret_cast<float2*>(to.enter)[lane] = {exp2_fast(totals.x), exp2_fast(totals.y)};
    reinterpret_cast<float2*>(to.leave)[lane] = {exp2_fast(end - totals.x) * step[0],
                                                 exp2_fast(end - totals.y) * step[1]};
    if (lane == 0) to.kept = exp2_fast(end);
    barrier_arrive(at.full + b % kScanStages * 8);
  }
}

}  // namespace bitkernels::cuda
