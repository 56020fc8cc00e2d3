// The two warpgroups of the second kernel of the backward scan that sum over the heads of a group:
// dC_i = enter_i (dy_i h) and dB_j = leave_j dt_j (x_j dh), scaled after the product so that nothing is rounded twice,
// and in the end the gradient of C B^T times B or C. The second makes dx of every head too.
#pragma once

#include "scan_gradient.cuh"

namespace bitkernels::cuda {

constexpr int kColumns = 64;  // of a box

// The sums of dB or dC: a box of columns at a time, as the product of all would take too many registers.
template <int N>
using GroupSums = float[N / kColumns][kColumns / 2];

// left [64 tokens, 64] times a box of a state, its rows along the dimension that is summed over.
template <typename T>
__device__ __forceinline__ void times_state(float (&product)[kColumns / 2], SharedAddress left, SharedAddress state) {
  const uint64_t a = wgmma_descriptor(left), b = wgmma_rows_descriptor(state, kScanBoxBytes);
#pragma unroll
  for (int k = 0; k < kHeaddim / 16; ++k) {
    wgmma_shared<0, 1>(T(), product, a + step_in_boxes(k), b + step_in_rows(k), k > 0);
  }
  wgmma_commit();
}

// Adds the gradient of C B^T of all heads times B or C, and stores.
template <typename T, int N, bool kOfC>
__device__ __forceinline__ void store_group(const GradientPlace<N>& at, const GradientProblem& p, int row, int t,
                                            GroupSums<N>& sum) {
  named_barrier(1, 3 * kScanWarpgroup);
  wgmma_fence();
#pragma unroll
  for (int box = 0; box < N / kColumns; ++box) {
    const uint64_t right = wgmma_rows_descriptor((kOfC ? at.B : at.C) + box * kScanBoxBytes, kScanBoxBytes);
#pragma unroll
    for (int k = 0; k < kScanTokens / 16; ++k) {
      if constexpr (kOfC) {
        const uint64_t left = wgmma_rows_descriptor(at.weights, kScanBoxBytes);
        wgmma_shared<1, 1>(T(), sum[box], left + step_in_rows(k), right + step_in_rows(k), 1);
      } else {
        wgmma_shared<0, 1>(T(), sum[box], wgmma_descriptor(at.weights) + step_in_boxes(k), right + step_in_rows(k), 1);
      }
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int box = 0; box < N / kColumns; ++box) pin(sum[box]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = at.token + row + 8 * half;
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

// dC, what the state before the block gives each token, and what it gives the state after it.
template <typename T, int N>
__device__ void enter_gradients(const GradientPlace<N>& at, const GradientProblem& p) {
  using Place = GradientPlace<N>;
  const int thread = threadIdx.x % kScanWarpgroup;
  const int warp = uniform(thread / 32), lane = thread % 32;
  const int t = lane % 4;
  const int row = 16 * warp + lane / 4;  // and row + 8
  const int tile_at = in_box(16 * warp + lane % 16, lane / 16);

  barrier_wait(at.ready, 0);
  GroupSums<N> sum = {};
  const int heads = uniform(at.heads);
  for (int n = 0; n < heads; ++n) {
    at.wait_full(n);
    const SharedAddress stage = at.stage(n);
    const ScanRows& rows = at.rows[n % kGradientStages];
    const float scale[2] = {exp2_fast(rows.total[row]), exp2_fast(rows.total[row + 8])};
    float of_enter[2] = {}, both = 0.0f;
#pragma unroll
    for (int box = 0; box < Place::kBoxes; ++box) {
      float product[kColumns / 2];
      wgmma_fence();
      times_state<T>(product, stage + Place::kDy, stage + Place::kH + box * kScanBoxBytes);
      // h dh, element by element: in any order.
#pragma unroll
      for (int i = 0; i < kScanBoxBytes / (16 * kScanWarpgroup); ++i) {
        const int place = box * kScanBoxBytes + 16 * (thread + i * kScanWarpgroup);
        uint32_t h[4], dh[4];
        load_words(stage + Place::kH + place, h);
        load_words(stage + Place::kDh + place, dh);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 v = unpack_pair(T(), h[j]), w = unpack_pair(T(), dh[j]);
          both += v.x * w.x + v.y * w.y;
        }
      }
      wgmma_wait<0>();
      pin(product);
      if (box == Place::kBoxes - 1) at.release(n, lane);
#pragma unroll
      for (int k = 0; k < kColumns / 16; ++k) {
        uint32_t c[4];
        load_matrices((at.C + box * kScanBoxBytes + tile_at) ^ k * 32, c);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int e = 8 * k + r / 2 * 4 + r % 2 * 2;
          const float2 v = unpack_pair(T(), c[r]);
          of_enter[r % 2] += v.x * product[e] + v.y * product[e + 1];
          sum[box][e] += scale[r % 2] * product[e];
          sum[box][e + 1] += scale[r % 2] * product[e + 1];
        }
      }
    }
    HeadSums& sums = at.wait_added(n);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float v = row_sum(of_enter[half]) * scale[half];
      if (t == 0) sums.enter[row + 8 * half] = v;
    }
    both = warp_reduce(both, Sum());
    if (lane == 0) sums.both[warp] = both;
    at.say_summed(n, lane);
  }
  store_group<T, N, true>(at, p, row, t, sum);
}

// dB, dx = W dy + leave dt (dh B) + D dy with W of the warpgroup of pairs, and what each token gives the state after
// the block.
template <typename T, int N>
__device__ void leave_gradients(const GradientPlace<N>& at, const GradientProblem& p, const CUtensorMap& dx_map) {
  using Place = GradientPlace<N>;
  const int warp = uniform(threadIdx.x % kScanWarpgroup / 32), lane = threadIdx.x % 32;
  const int t = lane % 4;
  const int row = 16 * warp + lane / 4;  // and row + 8
  const int tile_at = in_box(16 * warp + lane % 16, lane / 16);

  barrier_wait(at.ready, 0);
  GroupSums<N> sum = {};
  const int heads = uniform(at.heads);
  for (int n = 0; n < heads; ++n) {
    at.wait_full(n);
    const SharedAddress stage = at.stage(n);
    const ScanRows& rows = at.rows[n % kGradientStages];
    float dx[kHeaddim / 2];
    const uint64_t B = wgmma_descriptor(at.B), dH = wgmma_descriptor(stage + Place::kDh);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      wgmma_shared<0, 0>(T(), dx, B + step_in_boxes(k), dH + step_in_boxes(k), k > 0);
    }
    wgmma_commit();
    const float end = rows.total[kScanTokens - 1];
    const float leave[2] = {exp2_fast(end - rows.total[row]), exp2_fast(end - rows.total[row + 8])};
    const float scale[2] = {leave[0] * rows.step[row], leave[1] * rows.step[row + 8]};
    const float D = p.D ? p.D[at.first_head + n] : 0.0f;
    wgmma_wait<0>();
    pin(dx);
    float of_leave[2] = {}, skip = 0.0f;
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
    barrier_wait(at.weighed, n % 2);
    const uint64_t W = wgmma_descriptor(at.weights);
    const uint64_t dY = wgmma_rows_descriptor(stage + Place::kDy, kScanBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kScanTokens / 16; ++k) {
      wgmma_shared<0, 1>(T(), dx, W + step_in_boxes(k), dY + step_in_rows(k), 1);
    }
    wgmma_commit();
    float product[kColumns / 2];
    times_state<T>(product, stage, stage + Place::kDh);
    wgmma_wait<1>();
    pin(dx);
    if (lane == 0) barrier_arrive(at.applied);
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
      store_tokens(&dx_map, at.out + 16 * warp * 128, 0, at.first_head + n, at.token + 16 * warp, at.row);
      commit_stores();
    }
#pragma unroll
    for (int box = 0; box < Place::kBoxes; ++box) {
      if (box > 0) {
        wgmma_fence();
        times_state<T>(product, stage, stage + Place::kDh + box * kScanBoxBytes);
      }
      wgmma_wait<0>();
      pin(product);
      if (box == Place::kBoxes - 1) at.release(n, lane);
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sum[box][i] += scale[i / 2 % 2] * product[i];
    }
    HeadSums& sums = at.wait_added(n);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float v = row_sum(of_leave[half]) * leave[half];
      if (t == 0) sums.leave[row + 8 * half] = v;
    }
    skip = warp_reduce(skip, Sum());
    if (lane == 0) sums.skip[warp] = skip;
    at.say_summed(n, lane);
  }
  if (lane == 0) wait_for_stores();
  store_group<T, N, false>(at, p, row, t, sum);
}

}  // namespace bitkernels::cuda
