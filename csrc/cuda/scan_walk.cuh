// The first kernel of the backward scan: a thread block walks through one head of one batch row, forward in time for
// the state before every block or backward for the gradient of the state after it, and leaves them in memory in 16
// bits. One warpgroup holds the state; of another, one warp fetches and three turn dt into decays.
#pragma once

#include "scan_produce.cuh"
#include "scan_state.cuh"

namespace bitkernels::cuda {

constexpr int kWalkStages = 3;
constexpr int kWalkDecayWarps = 3;
constexpr int kWalkThreads = 2 * kScanWarpgroup;

// Of one head and block, as the second kernel reads it.
struct ScanRows {
  float total[kScanTokens];  // binary logarithms of the decays since the block began
  float step[kScanTokens];   // step sizes
  float slope[kScanTokens];  // their derivatives with respect to dt
};

struct WalkProblem {
  const void* dt;
  const float *A, *dt_bias, *initial, *dfinal;
  float* dinitial;
  ScanRows* rows;
  int64_t dt_batch, dt_time, dt_head;
  float dt_min, dt_max;
  DType dt_dtype;
  bool dt_softplus;
  int T, H, heads_per_group, blocks;
  int first_row;  // of the batch, of those whose states are held
};

template <int N>
struct WalkPlace {
  static constexpr int kBoxes = N / 64;
  static constexpr int kStateBytes = kBoxes * kScanBoxBytes;
  static constexpr int kStageBytes = kScanBoxBytes + kStateBytes;  // x and B, or dy and C
  static constexpr int kSlots = 2;                                 // of states on their way to memory
  static constexpr int kPlainBytes = kWalkStages * (kScanTokens + 4) * sizeof(float) + 16 * kWalkStages;
  static constexpr int kSharedBytes =
      1024 + (kPlainBytes + 1023) / 1024 * 1024 + kWalkStages * kStageBytes + kSlots * kStateBytes;

  float* scales;         // [stages][64] of a token's x or dy
  float* kept;           // [stages][4] what is left of the state
  SharedAddress full;    // [stages] barriers: a stage has landed
  SharedAddress empty;   // [stages]: and was read
  SharedAddress stages;  // x and B, or dy and C, as boxes of 64 columns
  SharedAddress states;  // [slots] of [64, N], in boxes of 64 columns
  bool backward;
  int part_row, row, head, group, blocks;

  __device__ WalkPlace(uint4* shared, const WalkProblem& p) {
    scales = reinterpret_cast<float*>(shared);
    kept = scales + kWalkStages * kScanTokens;
    full = shared_address(kept + kWalkStages * 4);
    empty = full + 8 * kWalkStages;
    stages = (empty + 8 * kWalkStages + 1023) & ~1023u;
    states = stages + kWalkStages * kStageBytes;
    backward = blockIdx.y;
    part_row = static_cast<int>(blockIdx.x) / p.H;
    row = p.first_row + part_row;
    head = static_cast<int>(blockIdx.x) % p.H;
    group = head / p.heads_per_group;
    blocks = p.blocks;
  }

  __device__ int block(int step) const { return backward ? blocks - 1 - step : step; }
  __device__ SharedAddress stage(int step) const { return stages + step % kWalkStages * kStageBytes; }
  __device__ void wait_full(int step) const { barrier_wait(full + step % kWalkStages * 8, step / kWalkStages % 2); }
  __device__ void wait_empty(int step) const {
    barrier_wait(empty + step % kWalkStages * 8, step / kWalkStages % 2 ^ 1);
  }
};

template <int N>
__device__ void fetch_walk(const WalkPlace<N>& at, const CUtensorMap& u, const CUtensorMap& v) {
  using Place = WalkPlace<N>;
  for (int s = 0; s < at.blocks; ++s) {
    at.wait_empty(s);
    const SharedAddress full = at.full + s % kWalkStages * 8;
    const int token = at.block(s) * kScanTokens;
    barrier_arrive_expecting(full, Place::kStageBytes);
    load_tokens(&u, at.stage(s), full, 0, at.head, token, at.row);
#pragma unroll
    for (int i = 0; i < Place::kBoxes; ++i) {
      load_tokens(&v, at.stage(s) + (i + 1) * kScanBoxBytes, full, 64 * i, at.group, token, at.row);
    }
  }
}

// Warp `warp` of kWalkDecayWarps takes every kWalkDecayWarps-th block; a lane has two neighbouring tokens.
template <int N>
__device__ void decays_of_walk(const WalkPlace<N>& at, const WalkProblem& p, int warp, int lane) {
  // A warp must wait for every phase of the barriers it waits for.
  static_assert(kWalkStages % kWalkDecayWarps == 0);
  const float A = p.A[at.head] * kLog2E;
  const float bias = p.dt_bias ? p.dt_bias[at.head] : 0.0f;
  const StepReader reader{p.dt, at.row * p.dt_batch + at.head * p.dt_head, p.dt_time, p.T, p.dt_dtype};
  uint32_t next[2];
  reader.fetch(at.block(min(warp, at.blocks - 1)), lane, next);
  for (int s = warp; s < at.blocks; s += kWalkDecayWarps) {
    const int b = at.block(s);
    const float v[2] = {reader.value(next[0]) + bias, reader.value(next[1]) + bias};
    reader.fetch(at.block(min(s + kWalkDecayWarps, at.blocks - 1)), lane, next);
    float step[2], slope[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = b * kScanTokens + 2 * lane + i < p.T;
      const float raw = p.dt_softplus ? soft_plus(v[i]) : v[i];
      step[i] = there ? clamp_step(raw, p.dt_min, p.dt_max) : 0.0f;
      slope[i] = !there || raw < p.dt_min || raw > p.dt_max ? 0.0f : p.dt_softplus ? 1.0f / (1.0f + expf(-v[i])) : 1.0f;
    }
    float end;
    const float2 totals = running_sums(step[0] * A, step[1] * A, lane, end);
    at.wait_empty(s);
    const int stage = s % kWalkStages;
    reinterpret_cast<float2*>(at.scales + stage * kScanTokens)[lane] =
        at.backward ? float2{exp2_fast(totals.x), exp2_fast(totals.y)}
                    : float2{exp2_fast(end - totals.x) * step[0], exp2_fast(end - totals.y) * step[1]};
    if (lane == 0) at.kept[4 * stage] = exp2_fast(end);
    __syncwarp();
    if (lane == 0) barrier_arrive(at.full + stage * 8);
    if (!at.backward) {
      ScanRows& to = p.rows[(int64_t(at.part_row) * at.blocks + b) * p.H + at.head];
      reinterpret_cast<float2*>(to.total)[lane] = totals;
      reinterpret_cast<float2*>(to.step)[lane] = {step[0], step[1]};
      reinterpret_cast<float2*>(to.slope)[lane] = {slope[0], slope[1]};
    }
  }
}

template <typename T, int N>
__device__ void walk(const WalkPlace<N>& at, const WalkProblem& p, const CUtensorMap& states) {
  using Place = WalkPlace<N>;
  constexpr int kSteps = kScanTokens / 16;
  const int warp = uniform(threadIdx.x % kScanWarpgroup / 32), lane = threadIdx.x % 32;
  const int row = 16 * warp + lane / 4, t = lane % 4;
  const int64_t of_state = (int64_t(at.row) * p.H + at.head) * kHeaddim * N;
  const float* enter = at.backward ? p.dfinal : p.initial;

  float h[N / 2];
  load_state<N>(enter ? enter + of_state : nullptr, row, t, h);
  const int u_at = transposed_at(warp, lane);
  const auto added = [&](int s, uint32_t (&a)[kSteps][4]) {
    at.wait_full(s);
    load_scaled<T>(at.stage(s) + u_at, at.scales + s % kWalkStages * kScanTokens, t, a);
  };
  const int h_at = in_box(16 * warp + lane % 16, lane / 16);
  const int blocks = uniform(at.blocks);
  uint32_t a[kSteps][4];
  added(0, a);
  for (int s = 0; s < blocks; ++s) {
    uint32_t before[N / 4];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) before[i] = pack_pair(T(), h[2 * i], h[2 * i + 1]);
    const float kept = at.kept[s % kWalkStages * 4];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) h[i] *= kept;
    const uint64_t v = wgmma_rows_descriptor(at.stage(s) + kScanBoxBytes, kScanBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma_rows(T(), h, a[k], v + k * 16 * 128 / 16, 1);
    wgmma_commit();

    // Every warp stores its own rows; the copy of two blocks ago has read them.
    const SharedAddress slot = at.states + s % Place::kSlots * Place::kStateBytes;
    if (lane == 0) wait_for_stores_to_read<Place::kSlots - 1>();
    __syncwarp();
    store_boxes(slot, h_at, before);
    copy_engine_fence();
    __syncwarp();
    if (lane == 0) {
      const int64_t of_block = (int64_t(at.part_row) * blocks + at.block(s)) * p.H + at.head;
#pragma unroll
      for (int i = 0; i < Place::kBoxes; ++i) {
        store_box(&states, slot + i * kScanBoxBytes + 16 * warp * 128, 64 * i,
                  static_cast<int>(of_block * kHeaddim + 16 * warp));
      }
      commit_stores();
    }
    uint32_t next[kSteps][4];
    if (s + 1 < blocks) added(s + 1, next);
    wgmma_wait<0>();
    pin(h);
    pin(a);
    __syncwarp();
    if (lane == 0) barrier_arrive(at.empty + s % kWalkStages * 8);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[k][i] = next[k][i];
    }
  }
  if (at.backward && p.dinitial) store_state<N>(p.dinitial + of_state, row, t, h);
  if (lane == 0) wait_for_stores();
}

template <typename T, int N>
__global__ void __launch_bounds__(kWalkThreads, 2)
    scan_walk_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap B,
                     const __grid_constant__ CUtensorMap dy, const __grid_constant__ CUtensorMap C,
                     const __grid_constant__ CUtensorMap h, const __grid_constant__ CUtensorMap dh, WalkProblem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint4 shared[];
  const WalkPlace<N> at(shared, p);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWalkStages; ++i) {
      barrier_init(at.full + 8 * i, 2);
      barrier_init(at.empty + 8 * i, 4);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const int warp = uniform(threadIdx.x / 32);
  if (warp < kScanWarpgroup / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 48;");
    if (warp < kWalkDecayWarps) {
      decays_of_walk(at, p, warp, threadIdx.x % 32);
    } else if (threadIdx.x % 32 == 0) {
      fetch_walk(at, at.backward ? dy : x, at.backward ? C : B);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
    walk<T, N>(at, p, at.backward ? dh : h);
  }
#endif
}

}  // namespace bitkernels::cuda
