// The warpgroup of the scan that holds the state h [64, N] of its head in registers and leads it from block to block.
#pragma once

#include "operand.cuh"
#include "scan_layout.cuh"
#include "wgmma.cuh"

namespace bitkernels::cuda {

// Two 16-bit values, the first in the lower half.
__device__ inline float2 unpack_pair(bf16, uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ inline float2 unpack_pair(fp16, uint32_t pair) { return __half22float2(*reinterpret_cast<__half2*>(&pair)); }

// Rows g and g + 8 of every warp's sixteen of a state [64, N] in float32, as the sums of a product hold them.
template <int N>
__device__ __forceinline__ void load_state(const float* state, int row, int t, float (&h)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    float2 v = {0.0f, 0.0f};
    if (state) v = *reinterpret_cast<const float2*>(state + (row + i % 2 * 8) * N + i / 2 * 8 + 2 * t);
    h[2 * i] = v.x;
    h[2 * i + 1] = v.y;
  }
}
template <int N>
__device__ __forceinline__ void store_state(float* state, int row, int t, const float (&h)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    *reinterpret_cast<float2*>(state + (row + i % 2 * 8) * N + i / 2 * 8 + 2 * t) = {h[2 * i], h[2 * i + 1]};
  }
}

// x^T of a block as the left operand, scaled token by token: each(k, i, pair) for what register i of step k holds. `x`
// is where the lane's rows begin, see transposed_at().
template <typename T, typename Each>
__device__ __forceinline__ void scale_pairs(SharedAddress x, const float* scales, int t, Each&& each) {
  const float2* scale_of = reinterpret_cast<const float2*>(scales) + t;
#pragma unroll
  for (int k = 0; k < kScanTokens / 16; ++k) {
    uint32_t pairs[4];
    load_transposed(x + k * 16 * 128, pairs);
    const float2 first = scale_of[8 * k], last = scale_of[8 * k + 4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 v = unpack_pair(T(), pairs[i]);
      const float2 scale = i < 2 ? first : last;
      each(k, i, float2{v.x * scale.x, v.y * scale.y});
    }
  }
}
template <typename T>
__device__ __forceinline__ void load_scaled(SharedAddress x, const float* scales, int t,
                                            uint32_t (&a)[kScanTokens / 16][4]) {
  scale_pairs<T>(x, scales, t, [&](int k, int i, float2 v) { a[k][i] = pack_pair(T(), v.x, v.y); });
}
__device__ inline int transposed_at(int warp, int lane) {
  return in_box(lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2);
}

// Sums in 16 bits, to a box of 64 columns in shared memory for every 64 of them. `at` is in_box(16 * warp + lane % 16,
// lane / 16): where a lane puts its row of the four tiles that a warp writes at once.
template <int kPairs>
__device__ __forceinline__ void store_boxes(SharedAddress boxes, int at, const uint32_t (&pairs)[kPairs]) {
#pragma unroll
  for (int i = 0; i < kPairs / 4; ++i) {
    store_matrices((boxes + i / 4 * kScanBoxBytes + at) ^ i % 4 * 32, pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2],
                   pairs[4 * i + 3]);
  }
}

template <typename T, int N>
__device__ void lead_state(const ScanPlace<N>& at, const ScanProblem& p) {
  using Place = ScanPlace<N>;
  constexpr int kSteps = kScanTokens / 16;
  const int thread = threadIdx.x % kScanWarpgroup;
  const int warp = thread / 32, lane = thread % 32;
  const int row = 16 * warp + lane / 4, t = lane % 4;
  const int64_t of_state = (int64_t(at.row) * p.H + at.head) * kHeaddim * N;

  float h[N / 2];
  load_state<N>(p.initial_states ? p.initial_states + of_state : nullptr, row, t, h);
  const int x_at = transposed_at(warp, lane);
  const auto added = [&](int b, uint32_t (&a)[kSteps][4]) {
    at.wait_full(b);
    load_scaled<T>(at.stage(b) + x_at, at.decays[b % kScanStages].leave, t, a);
  };

  const int h_at = in_box(16 * warp + lane % 16, lane / 16);
  const int begin = uniform(at.begin), end = uniform(at.end);  // in registers: a load would wait behind the stores
  uint32_t a[kSteps][4];
  added(0, a);
  for (int b = 0; b < end; ++b) {
    // The next block waits for this product alone: while it runs, the state before it is written if outputs need it.
    uint32_t before[N / 4];
    if (b >= begin) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) before[i] = pack_pair(T(), h[2 * i], h[2 * i + 1]);
    }
    const float kept = at.decays[b % kScanStages].kept;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) h[i] *= kept;
    const uint64_t B = wgmma_rows_descriptor(at.stage(b) + Place::kB, kScanBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma_rows(T(), h, a[k], B + k * 16 * 128 / 16, 1);
    wgmma_commit();

    const int slot = b % kOutputGroups;
    if (b >= begin) {
      barrier_wait(at.read + 8 * slot, (b - begin) / kOutputGroups % 2 ^ 1);
      store_boxes(at.states + slot * Place::kStateBytes, h_at, before);
    }
    uint32_t next[kSteps][4];
    if (b + 1 < end) added(b + 1, next);
    if (b >= begin) {
      copy_engine_fence();
      __syncwarp();
      if (lane == 0) barrier_arrive(at.written + 8 * slot);
    }
    wgmma_wait<0>();
    pin(h);
    pin(a);
    at.release(b, lane);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[k][i] = next[k][i];
    }
  }
  if (p.final_states && end == p.blocks) store_state<N>(p.final_states + of_state, row, t, h);
}

}  // namespace bitkernels::cuda
