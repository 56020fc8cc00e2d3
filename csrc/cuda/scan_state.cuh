// The warpgroup of the scan that holds the state h [64, N] of its head in registers and leads it from block to block.
#pragma once

#include "operand.cuh"
#include "scan_layout.cuh"
#include "wgmma.cuh"

namespace bitkernels::cuda {

// The first half of two 16-bit values as a float.
__device__ inline float2 unpack_pair(bf16, uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ inline float2 unpack_pair(fp16, uint32_t pair) { return __half22float2(*reinterpret_cast<__half2*>(&pair)); }

template <typename T, int N>
__device__ void lead_state(const ScanPlace<N>& at, const ScanProblem& p) {
  using Place = ScanPlace<N>;
  constexpr int kSteps = kScanTokens / 16;
  const int thread = threadIdx.x % kScanWarpgroup;
  const int warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t of_state = (int64_t(at.row) * p.H + at.head) * kHeaddim * N;

  float h[N / 2];
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 v = {0.0f, 0.0f};
      if (p.initial_states) {
        v = *reinterpret_cast<const float2*>(p.initial_states + of_state + (16 * warp + g + 8 * half) * N + 8 * i +
                                             2 * t);
      }
      h[4 * i + 2 * half] = v.x;
      h[4 * i + 2 * half + 1] = v.y;
    }
  }

  // x^T scaled by what each token leaves, as the left operand.
  const int x_row = lane % 8 + lane / 16 * 8;
  const int x_at = in_box(x_row, 2 * warp + lane / 8 % 2);
  const auto added = [&](int b, uint32_t (&a)[kSteps][4]) {
    at.wait_full(b);
    const SharedAddress x = at.stage(b) + x_at;
    const float2* leave = reinterpret_cast<const float2*>(at.decays[b % kScanStages].leave) + t;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      load_transposed(x + k * 16 * 128, a[k]);
      const float2 first = leave[8 * k], last = leave[8 * k + 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 v = unpack_pair(T(), a[k][i]);
        const float2 scale = i < 2 ? first : last;
        a[k][i] = pack_pair(T(), v.x * scale.x, v.y * scale.y);
      }
    }
  };

  // Where a lane puts its row of the four tiles that a warp writes at once: rows, rows + 8, and the next chunk.
  const int h_at = in_box(16 * warp + lane % 16, lane / 16);
  const int blocks = uniform(p.blocks);  // in a register: a load would wait behind the stores
  uint32_t a[kSteps][4];
  added(0, a);
  for (int b = 0; b < blocks; ++b) {
    // The next block waits for this product alone: while it runs, the state before it is written.
    uint32_t before[N / 8][2];
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      before[i][0] = pack_pair(T(), h[4 * i], h[4 * i + 1]);
      before[i][1] = pack_pair(T(), h[4 * i + 2], h[4 * i + 3]);
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
    const SharedAddress to = at.states + slot * Place::kStateBytes;
    barrier_wait(at.read + 8 * slot, b / kOutputGroups % 2 ^ 1);
#pragma unroll
    for (int i = 0; i < N / 8; i += 2) {
      store_matrices((to + i / 8 * kScanBoxBytes + h_at) ^ i % 8 * 16, before[i][0], before[i][1], before[i + 1][0],
                     before[i + 1][1]);
    }
    uint32_t next[kSteps][4];
    if (b + 1 < blocks) added(b + 1, next);
    copy_engine_fence();
    __syncwarp();
    if (lane == 0) barrier_arrive(at.written + 8 * slot);
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

#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(p.final_states + of_state + (16 * warp + g + 8 * half) * N + 8 * i + 2 * t) = {
          h[4 * i + 2 * half], h[4 * i + 2 * half + 1]};
    }
  }
}

}  // namespace bitkernels::cuda
