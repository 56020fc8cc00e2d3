// The warpgroup of the second kernel of the backward scan that takes the pairs of tokens of a block: their weights
// (C B^T)^T * decay * dt [j, i], of which x dy^T is the gradient.
#pragma once

#include "scan_gradient.cuh"

namespace bitkernels::cuda {

// Halves v among the lanes that differ in one bit: each keeps the sums of a half.
template <int kCount>
__device__ __forceinline__ void exchange_halves(float (&v)[16], bool upper, int distance) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float sent = upper ? v[i] : v[i + kCount];
    const float kept = upper ? v[i + kCount] : v[i];
    v[i] = kept + __shfl_xor_sync(0xffffffff, sent, distance);
  }
}

// v[2 i + c] of column 8 i + 2 t + c, summed over the eight lanes with the same t: those of i = lane / 4 remain, first.
__device__ __forceinline__ void column_sums(float (&v)[16], int lane) {
  exchange_halves<8>(v, lane & 16, 16);
  exchange_halves<4>(v, lane & 8, 8);
  exchange_halves<2>(v, lane & 4, 4);
}

template <typename T, int N>
__device__ void pair_gradients(const GradientPlace<N>& at) {
  using Place = GradientPlace<N>;
  constexpr int kSteps = kScanTokens / 16;
  const int warp = uniform(threadIdx.x % kScanWarpgroup / 32), lane = threadIdx.x % 32;
  const int t = lane % 4;
  const int row = 16 * warp + lane / 4;  // and row + 8
  const int tile_at = in_box(16 * warp + lane % 16, lane / 16);
  float4* const CB = at.CB + threadIdx.x % kScanWarpgroup;

  barrier_wait(at.ready, 0);
  {
    float pairs[kScanTokens / 2];
    const uint64_t B = wgmma_descriptor(at.B), C = wgmma_descriptor(at.C);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      wgmma_shared<0, 0>(T(), pairs, B + step_in_boxes(k), C + step_in_boxes(k), k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(pairs);
#pragma unroll
    for (int i = 0; i < kScanTokens / 8; ++i) {
      CB[i * kScanWarpgroup] = {pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]};
    }
  }

  float dCB[kScanTokens / 2] = {};
  const int heads = uniform(at.heads);
  for (int n = 0; n < heads; ++n) {
    at.wait_full(n);
    const SharedAddress stage = at.stage(n);
    const ScanRows& rows = at.rows[n % kGradientStages];
    float pairs[kScanTokens / 2];
    const uint64_t X = wgmma_descriptor(stage), dY = wgmma_descriptor(stage + Place::kDy);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      wgmma_shared<0, 0>(T(), pairs, X + step_in_boxes(k), dY + step_in_boxes(k), k > 0);
    }
    wgmma_commit();

    // Decays and weights while the product runs, zero for the outputs before a token.
    const float total[2] = {rows.total[row], rows.total[row + 8]};
    const float step[2] = {rows.step[row], rows.step[row + 8]};
    float decay[kScanTokens / 2];
    uint32_t weights[kScanTokens / 4];
#pragma unroll
    for (int i = 0; i < kScanTokens / 8; ++i) {
      const float2 to = reinterpret_cast<const float2*>(rows.total)[4 * i + t];
      const float4 four = CB[i * kScanWarpgroup];
      const float cb[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int e = 4 * i + 2 * half;
        const int reached = row + 8 * half - 2 * t;
        decay[e] = exp2_fast(reached <= 8 * i ? to.x - total[half] : -INFINITY);
        decay[e + 1] = exp2_fast(reached <= 8 * i + 1 ? to.y - total[half] : -INFINITY);
        weights[2 * i + half] =
            pack_pair(T(), cb[2 * half] * decay[e] * step[half], cb[2 * half + 1] * decay[e + 1] * step[half]);
      }
    }
    barrier_wait(at.applied, n % 2 ^ 1);
    store_boxes(at.weights, tile_at, weights);
    copy_engine_fence();
    __syncwarp();
    if (lane == 0) barrier_arrive(at.weighed);

    wgmma_wait<0>();
    pin(pairs);
    at.release(n, lane);
    float of_step[2] = {};
#pragma unroll
    for (int i = 0; i < kScanTokens / 8; ++i) {
      const float4 four = CB[i * kScanWarpgroup];
      const float cb[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int e = 4 * i + 2 * half + c;
          const float gradient = pairs[e] * decay[e];
          dCB[e] += gradient * step[half];
          const float weighted = gradient * cb[2 * half + c];
          of_step[half] += weighted;
          pairs[e] = weighted * step[half];
        }
      }
    }
    // What of a weight's gradient crosses decay k is a product with ones: in two parts, which together are exact
    // enough for what does not come from products.
    uint32_t high[kSteps][4], low[kSteps][4];
#pragma unroll
    for (int i = 0; i < kScanTokens / 4; ++i) {
      const uint32_t v = pack_pair(bf16(), pairs[2 * i], pairs[2 * i + 1]);
      const float2 rounded = unpack_pair(bf16(), v);
      high[i / 4][i % 4] = v;
      low[i / 4][i % 4] = pack_pair(bf16(), pairs[2 * i] - rounded.x, pairs[2 * i + 1] - rounded.y);
    }
    const uint64_t ones = wgmma_descriptor(at.ones);
    float crossing[kScanTokens / 2];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma(bf16(), crossing, high[k], ones + step_in_boxes(k), k > 0);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma(bf16(), crossing, low[k], ones + step_in_boxes(k), 1);
    wgmma_commit();
    HeadSums& sums = at.wait_added(n);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float v = row_sum(of_step[half]);
      if (t == 0) sums.pairs[row + 8 * half] = v;
    }
    wgmma_wait<0>();
    pin(crossing);
    pin(high);
    pin(low);
    float columns[kScanTokens / 4];
#pragma unroll
    for (int i = 0; i < kScanTokens / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int k = 8 * i + 2 * t + c;
        columns[2 * i + c] = (row < k ? crossing[4 * i + c] : 0.0f) + (row + 8 < k ? crossing[4 * i + 2 + c] : 0.0f);
      }
    }
    column_sums(columns, lane);
    reinterpret_cast<float2*>(sums.crossing[warp])[lane] = {columns[0], columns[1]};
    at.say_summed(n, lane);
  }

  // For the sums of dB and dC.
  uint32_t packed[kScanTokens / 4];
#pragma unroll
  for (int i = 0; i < kScanTokens / 4; ++i) packed[i] = pack_pair(T(), dCB[2 * i], dCB[2 * i + 1]);
  barrier_wait(at.applied, heads % 2 ^ 1);
  store_boxes(at.weights, tile_at, packed);
  copy_engine_fence();
  named_barrier(1, 3 * kScanWarpgroup);
}

}  // namespace bitkernels::cuda
