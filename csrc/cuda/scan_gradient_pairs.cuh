// The warpgroup of the second kernel of the backward scan that takes the pairs of tokens of a block, and dx:
// with S = x dy^T [j, i] and W = (C B^T) * decay * dt, dx = W dy + leave dt (dh B) + D dy.
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
__device__ void pair_gradients(const GradientPlace<N>& at, const GradientProblem& p, const CUtensorMap& dx_map) {
  using Place = GradientPlace<N>;
  constexpr int kSteps = kScanTokens / 16;
  const int warp = uniform(threadIdx.x % kScanWarpgroup / 32), lane = threadIdx.x % 32;
  const int t = lane % 4;
  const int row = 16 * warp + lane / 4;  // and row + 8
  const int tile_at = in_box(16 * warp + lane % 16, lane / 16);
  float4* const CB = at.CB + threadIdx.x % kScanWarpgroup;
  const uint64_t B = wgmma_descriptor(at.B), ones = wgmma_descriptor(at.ones);
  const auto step_of_state = [](int k) { return (k / 4 * kScanBoxBytes + k % 4 * 32) / 16; };

  barrier_wait(at.ready, 0);
  {
    float pairs[kScanTokens / 2];
    const uint64_t C = wgmma_descriptor(at.C);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      wgmma_shared<0, 0>(T(), pairs, B + step_of_state(k), C + step_of_state(k), k > 0);
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
    float pairs[kScanTokens / 2], dx[kHeaddim / 2];
    const uint64_t X = wgmma_descriptor(stage), dY = wgmma_descriptor(stage + Place::kDy);
    const uint64_t dH = wgmma_descriptor(stage + Place::kDh);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma_shared<0, 0>(T(), pairs, X + 2 * k, dY + 2 * k, k > 0);
    wgmma_commit();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      wgmma_shared<0, 0>(T(), dx, B + step_of_state(k), dH + step_of_state(k), k > 0);
    }
    wgmma_commit();

    // Decays while the products run, zero for the outputs before a token.
    const float total[2] = {rows.total[row], rows.total[row + 8]};
    const float step[2] = {rows.step[row], rows.step[row + 8]};
    float decay[kScanTokens / 2];
#pragma unroll
    for (int i = 0; i < kScanTokens / 8; ++i) {
      const float2 to = reinterpret_cast<const float2*>(rows.total)[4 * i + t];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int reached = row + 8 * half - 2 * t;
        decay[4 * i + 2 * half] = exp2_fast(reached <= 8 * i ? to.x - total[half] : -INFINITY);
        decay[4 * i + 2 * half + 1] = exp2_fast(reached <= 8 * i + 1 ? to.y - total[half] : -INFINITY);
      }
    }
    const float end = rows.total[kScanTokens - 1];
    const float leave[2] = {exp2_fast(end - total[0]), exp2_fast(end - total[1])};
    const float D = p.D ? p.D[at.first_head + n] : 0.0f;

    wgmma_wait<1>();
    pin(pairs);
    uint32_t weights[kSteps][4];
    float of_step[2] = {};
#pragma unroll
    for (int i = 0; i < kScanTokens / 8; ++i) {
      const float4 four = CB[i * kScanWarpgroup];
      const float cb[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int e = 4 * i + 2 * half;
        weights[i / 2][i % 2 * 2 + half] =
            pack_pair(T(), cb[2 * half] * decay[e] * step[half], cb[2 * half + 1] * decay[e + 1] * step[half]);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float gradient = pairs[e + c] * decay[e + c];
          dCB[e + c] += gradient * step[half];
          const float weighted = gradient * cb[2 * half + c];
          of_step[half] += weighted;
          pairs[e + c] = weighted * step[half];
        }
      }
    }
    pin(dCB);  // at once: what it is made of takes registers

    wgmma_wait<0>();
    pin(dx);
    float of_leave[2] = {}, skip = 0.0f;
    const float scale[2] = {leave[0] * step[0], leave[1] * step[1]};
#pragma unroll
    for (int k = 0; k < kHeaddim / 16; ++k) {
      uint32_t x[4], dy[4];
      load_matrices((stage + tile_at) ^ k * 32, x);
      load_matrices((stage + Place::kDy + tile_at) ^ k * 32, dy);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float2 v = unpack_pair(T(), x[r]), w = unpack_pair(T(), dy[r]);
        const int e = 8 * k + r / 2 * 4 + r % 2 * 2;
        of_leave[r % 2] += v.x * dx[e] + v.y * dx[e + 1];
        skip += v.x * w.x + v.y * w.y;
        dx[e] = dx[e] * scale[r % 2] + D * w.x;
        dx[e + 1] = dx[e + 1] * scale[r % 2] + D * w.y;
      }
    }
    const uint64_t dY_rows = wgmma_rows_descriptor(stage + Place::kDy, kScanBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma_rows(T(), dx, weights[k], dY_rows + k * 16 * 128 / 16, 1);
    wgmma_commit();

    HeadSums& sums = at.wait_added(n);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      of_step[half] = row_sum(of_step[half]);
      of_leave[half] = row_sum(of_leave[half]) * leave[half];
      if (t == 0) {
        sums.pairs[row + 8 * half] = of_step[half];
        sums.leave[row + 8 * half] = of_leave[half];
      }
    }
    skip = warp_reduce(skip, Sum());
    if (lane == 0) sums.skip[warp] = skip;
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
    wgmma_wait<0>();
    pin(dx);
    pin(weights);
    at.release(n, lane);
    float crossing[kScanTokens / 2];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma(bf16(), crossing, high[k], ones + 2 * k, k > 0);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma(bf16(), crossing, low[k], ones + 2 * k, 1);
    wgmma_commit();

    // Every warp stores the gradients of its own tokens.
    uint32_t packed[kHeaddim / 4];
#pragma unroll
    for (int i = 0; i < kHeaddim / 4; ++i) packed[i] = pack_pair(T(), dx[2 * i], dx[2 * i + 1]);
    if (lane == 0) wait_for_stores_to_read();
    __syncwarp();
    store_boxes(at.out, tile_at, packed);
    copy_engine_fence();
    __syncwarp();
    if (lane == 0) {
      store_tokens(&dx_map, at.out + 16 * warp * 128, 0, at.first_head + n, at.block * kScanTokens + 16 * warp, at.row);
      commit_stores();
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
  if (lane == 0) wait_for_stores();
  __syncwarp();
  store_boxes(at.out, tile_at, packed);
  copy_engine_fence();
  named_barrier(1, 3 * kScanWarpgroup);
}

}  // namespace bitkernels::cuda
