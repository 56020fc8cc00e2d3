// The warpgroups of the scan that make outputs: y = ((C B^T) * decay * dt) x + exp(total) * (C h) for their blocks,
// times silu(z) where gates are given.
#pragma once

#include "reduce.cuh"
#include "scan_state.cuh"

namespace bitkernels::cuda {

template <typename T, int N, bool kGated>
__device__ void make_outputs(const ScanPlace<N>& at, const ScanProblem& p, const CUtensorMap& y_map, int group) {
  using Place = ScanPlace<N>;
  constexpr int kSteps = kScanTokens / 16;
  const int thread = threadIdx.x % kScanWarpgroup;
  const int warp = uniform(thread / 32), lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int row = 16 * warp + g;  // and row + 8
  const SharedAddress state = at.states + group * Place::kStateBytes;
  const int tile_at = in_box(16 * warp + lane % 16, lane / 16);  // for loads and stores of four tiles at once
  const int begin = uniform(at.begin), end = uniform(at.end);
  const auto box_of = [&](int b) { return kGated ? at.gate_box(b) : group; };
  // Every warp stores the outputs of its own tokens.
  const auto store = [&](int b) {
    const SharedAddress out = at.outputs + box_of(b) * kScanBoxBytes;
    copy_engine_fence();
    __syncwarp();
    if (lane == 0) {
      store_tokens(&y_map, out + 16 * warp * 128, 0, at.head, b * kScanTokens + 16 * warp, at.row);
      commit_stores();
    }
  };

  int b = group;
  for (; b < begin; b += kOutputGroups) {  // a warp must see every phase of the barriers it waits for
    at.wait_full(b);
    at.release(b, lane);
  }
  for (; b < end; b += kOutputGroups) {
    at.wait_full(b);
    const SharedAddress stage = at.stage(b);
    const ScanDecays& decays = at.decays[b % kScanStages];
    uint32_t c[N / 16][4];
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      load_matrices((stage + Place::kC + k / 4 * kScanBoxBytes + tile_at) ^ k % 4 * 32, c[k]);
    }
    const float* totals = reinterpret_cast<const float*>(&decays.pairs[row / 2]) + row % 2;
    const float total[2] = {totals[0], totals[16]};
    float pairs[kScanTokens / 2];
    float y[kHeaddim / 2];
    const uint64_t B = wgmma_descriptor(stage + Place::kB);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      wgmma(T(), pairs, c[k], B + (k / 4 * kScanBoxBytes + k % 4 * 32) / 16, k > 0);
    }
    wgmma_commit();
    barrier_wait(at.written + 8 * group, (b - begin) / kOutputGroups % 2);
    const uint64_t H = wgmma_descriptor(state);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      wgmma(T(), y, c[k], H + (k / 4 * kScanBoxBytes + k % 4 * 32) / 16, k > 0);
    }
    wgmma_commit();

    // Decays while the products run, zero for the tokens after an output. The same for all warps, with no branches:
    // what takes time here is to wait for shared memory, which the tensor cores keep busy.
    float decay[kScanTokens / 2];
#pragma unroll
    for (int i = 0; i < kScanTokens / 8; ++i) {
      const float4 from = decays.pairs[4 * i + t];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int reaches = row + 8 * half - 2 * t;
        const float first = 8 * i <= reaches ? total[half] - from.x : -INFINITY;
        const float second = 8 * i + 1 <= reaches ? total[half] - from.y : -INFINITY;
        decay[4 * i + 2 * half] = exp2_fast(first) * from.z;
        decay[4 * i + 2 * half + 1] = exp2_fast(second) * from.w;
      }
    }
    // The outputs of the last block, whose writes to shared memory have ended by now.
    if (b - kOutputGroups >= begin) store(b - kOutputGroups);
    wgmma_wait<1>();
    pin(pairs);
    uint32_t weights[kSteps][4];
#pragma unroll
    for (int i = 0; i < kScanTokens / 4; ++i) {
      weights[i / 4][i % 4] = pack_pair(T(), pairs[2 * i] * decay[2 * i], pairs[2 * i + 1] * decay[2 * i + 1]);
    }
    const float enter[2] = {decays.enter[row], decays.enter[row + 8]};
    wgmma_wait<0>();
    pin(y);
    pin(c);
    __syncwarp();
    if (lane == 0) barrier_arrive(at.read + 8 * group);
#pragma unroll
    for (int i = 0; i < kHeaddim / 2; ++i) y[i] *= enter[i / 2 % 2];
    const uint64_t X = wgmma_rows_descriptor(stage, kScanBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma_rows(T(), y, weights[k], X + k * 16 * 128 / 16, 1);
    wgmma_commit();
    float skipped[kHeaddim / 2];
#pragma unroll
    for (int i = 0; i < kHeaddim / 8; i += 2) {
      uint32_t x[4];
      load_matrices((stage + tile_at) ^ i * 16, x);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 v = unpack_pair(T(), x[j]);
        const float2 D = reinterpret_cast<const float2*>(at.D)[4 * (i + j / 2) + t];
        skipped[4 * i + 2 * j] = D.x * v.x;
        skipped[4 * i + 2 * j + 1] = D.y * v.y;
      }
    }
    const SharedAddress out = at.outputs + box_of(b) * kScanBoxBytes;
    if (lane == 0) {
      wait_for_stores_to_read();
      if (kGated && b - kOutputGroups >= begin) barrier_arrive(at.left + box_of(b - kOutputGroups) * 8);
    }
    wgmma_wait<0>();
    pin(y);
    pin(weights);
    at.release(b, lane);
#pragma unroll
    for (int i = 0; i < kHeaddim / 2; ++i) y[i] += skipped[i];
    if constexpr (kGated) {
      barrier_wait(at.gate_barrier(b), (b - begin) / (kOutputGroups * kGateBoxes) % 2);
#pragma unroll
      for (int i = 0; i < kHeaddim / 8; i += 2) {
        uint32_t z[4];
        load_matrices((out + tile_at) ^ i * 16, z);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 v = unpack_pair(T(), z[j]);
          y[4 * i + 2 * j] *= silu(v.x);
          y[4 * i + 2 * j + 1] *= silu(v.y);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kHeaddim / 8; i += 2) {
      store_matrices((out + tile_at) ^ i * 16, pack_pair(T(), y[4 * i], y[4 * i + 1]),
                     pack_pair(T(), y[4 * i + 2], y[4 * i + 3]), pack_pair(T(), y[4 * i + 4], y[4 * i + 5]),
                     pack_pair(T(), y[4 * i + 6], y[4 * i + 7]));
    }
  }
  if (b - kOutputGroups >= begin) store(b - kOutputGroups);
  if (lane == 0) wait_for_stores();
}

}  // namespace bitkernels::cuda
