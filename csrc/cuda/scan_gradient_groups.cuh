// The two warpgroups of the second kernel of the backward scan that sum over the heads of a group:
// dC_i = enter_i (dy_i h) and dB_j = leave_j dt_j (x_j dh), scaled after the product so that nothing is rounded twice,
// and in the end the gradient of C B^T times B or C.
#pragma once

#include "scan_gradient.cuh"

namespace bitkernels::cuda {

template <typename T, int N, bool kOfC>
__device__ void group_gradients(const GradientPlace<N>& at, const GradientProblem& p) {
  using Place = GradientPlace<N>;
  constexpr int kSteps = kScanTokens / 16;
  constexpr int kColumns = 64;  // of a box
  const int thread = threadIdx.x % kScanWarpgroup;
  const int warp = uniform(thread / 32), lane = thread % 32;
  const int t = lane % 4;
  const int row = 16 * warp + lane / 4;  // and row + 8
  const int tile_at = in_box(16 * warp + lane % 16, lane / 16);

  if (kOfC) barrier_wait(at.ready, 0);
  float sum[Place::kBoxes][kColumns / 2] = {};
  const int heads = uniform(at.heads);
  for (int n = 0; n < heads; ++n) {
    at.wait_full(n);
    const SharedAddress stage = at.stage(n);
    const ScanRows& rows = at.rows[n % kGradientStages];
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = rows.total[row + 8 * half];
      scale[half] =
          kOfC ? exp2_fast(total) : exp2_fast(rows.total[kScanTokens - 1] - total) * rows.step[row + 8 * half];
    }
    const uint64_t left = wgmma_descriptor(stage + (kOfC ? Place::kDy : 0));
    float of_enter[2] = {}, both = 0.0f;
    // A box of columns at a time: the product of all would leave too few registers for the pairs of tokens.
#pragma unroll
    for (int box = 0; box < Place::kBoxes; ++box) {
      const SharedAddress state = stage + (kOfC ? Place::kH : Place::kDh) + box * kScanBoxBytes;
      const uint64_t right = wgmma_rows_descriptor(state, kScanBoxBytes);
      float product[kColumns / 2];
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        wgmma_shared<0, 1>(T(), product, left + 2 * k, right + k * 16 * 128 / 16, k > 0);
      }
      wgmma_commit();
      if (!kOfC) {  // h dh, element by element: in any order
#pragma unroll
        for (int i = 0; i < kScanBoxBytes / (16 * kScanWarpgroup); ++i) {
          const int at_bytes = box * kScanBoxBytes + 16 * (thread + i * kScanWarpgroup);
          uint32_t h[4], dh[4];
          load_words(stage + Place::kH + at_bytes, h);
          load_words(stage + Place::kDh + at_bytes, dh);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 v = unpack_pair(T(), h[j]), w = unpack_pair(T(), dh[j]);
            both += v.x * w.x + v.y * w.y;
          }
        }
      }
      wgmma_wait<0>();
      pin(product);
      if (box == Place::kBoxes - 1) at.release(n, lane);
#pragma unroll
      for (int k = 0; k < kColumns / 16; ++k) {
        uint32_t c[4];
        if (kOfC) load_matrices((at.C + box * kScanBoxBytes + tile_at) ^ k * 32, c);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int e = 8 * k + r / 2 * 4 + r % 2 * 2;
          if (kOfC) {
            const float2 v = unpack_pair(T(), c[r]);
            of_enter[r % 2] += v.x * product[e] + v.y * product[e + 1];
          }
          sum[box][e] += scale[r % 2] * product[e];
          sum[box][e + 1] += scale[r % 2] * product[e + 1];
        }
      }
    }
    HeadSums& sums = at.wait_added(n);
    if (kOfC) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float v = row_sum(of_enter[half]) * scale[half];
        if (t == 0) sums.enter[row + 8 * half] = v;
      }
    } else {
      both = warp_reduce(both, Sum());
      if (lane == 0) sums.both[warp] = both;
    }
    at.say_summed(n, lane);
  }

  named_barrier(1, 3 * kScanWarpgroup);
  if (!kOfC) barrier_wait(at.ready, 0);
  wgmma_fence();
#pragma unroll
  for (int box = 0; box < Place::kBoxes; ++box) {
    const uint64_t right = wgmma_rows_descriptor((kOfC ? at.B : at.C) + box * kScanBoxBytes, kScanBoxBytes);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      constexpr int kRows = 16 * 128 / 16;
      if constexpr (kOfC) {
        const uint64_t left = wgmma_rows_descriptor(at.out, kScanBoxBytes);
        wgmma_shared<1, 1>(T(), sum[box], left + k * kRows, right + k * kRows, 1);
      } else {
        wgmma_shared<0, 1>(T(), sum[box], wgmma_descriptor(at.out) + 2 * k, right + k * kRows, 1);
      }
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int box = 0; box < Place::kBoxes; ++box) pin(sum[box]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = at.block * kScanTokens + row + 8 * half;
    if (token >= p.T) continue;
    const int64_t split = p.parts ? at.split * p.batch : 0;
    const int64_t first = (((split + at.row) * p.T + token) * p.G + at.group) * N + 2 * t;
    void* const out = kOfC ? p.dC : p.dB;
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      const float* pair = &sum[i / 8][i % 8 * 4 + 2 * half];
      if (p.parts) {
        *reinterpret_cast<float2*>(static_cast<float*>(out) + first + 8 * i) = {pair[0], pair[1]};
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(out) + first + 8 * i) = pack_pair(T(), pair[0], pair[1]);
      }
    }
  }
}

}  // namespace bitkernels::cuda
