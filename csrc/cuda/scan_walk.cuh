// The first kernel of the backward scan: a thread block walks through one head of one batch row, forward in time for
// the state before every block or backward for the gradient of the state after it, and leaves them in memory in 16
// bits. One warpgroup holds the state; of another, one warp fetches and two turn dt into decays.
//
// The gradient of A adds up much that cancels, and wants more than 16 bits. So what a block adds to the state is a
// product of operands in two parts, and a walk finds what the rounding of the states it stores takes from dA: the inner
// product of what was lost with the derivative of what the block's tokens make of the state.
#pragma once

#include "reduce.cuh"
#include "scan_produce.cuh"
#include "scan_state.cuh"

namespace bitkernels::cuda {

constexpr int kWalkStages = 2;
constexpr int kWalkDecayWarps = 2;
constexpr int kWalkThreads = 2 * kScanWarpgroup;
constexpr int kLostRows = 8;  // a warp's in a direction of time

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
  float* lost;  // [B, kLostRows, H] of dA, by rounding the states
  int64_t dt_batch, dt_time, dt_head;
  float dt_min, dt_max;
  DType dt_dtype;
  bool dt_softplus;
  int T, H, heads_per_group;
  int blocks, first_block;  // of this part of time
  int first_row;            // of the batch, of those whose states are held
};

template <int N>
struct WalkPlace {
  static constexpr int kBoxes = N / 64;
  static constexpr int kStateBytes = kBoxes * kScanBoxBytes;
  static constexpr int kOther = kScanBoxBytes + kStateBytes;  // in a stage, after what leads the state
  static constexpr int kOut = kOther + kScanBoxBytes;         // C or B, then the state on its way to memory
  static constexpr int kStageBytes = kOut + kStateBytes;
  static constexpr int kPlainBytes = kWalkStages * (2 * kScanTokens + 4) * sizeof(float) + 16 * kWalkStages;
  static constexpr int kSharedBytes = 1024 + (kPlainBytes + 1023) / 1024 * 1024 + kWalkStages * kStageBytes;

  float* scales;         // [stages][64] of a token's x or dy in the state
  float* weights;        // [stages][64] of its dy or x in what the state gives dA
  float* kept;           // [stages][4] what is left of the state
  SharedAddress full;    // [stages] barriers: a stage has landed
  SharedAddress empty;   // [stages]: and was read
  SharedAddress stages;  // x, B, dy, C or dy, C, x, B as boxes of 64 columns
  bool backward;
  int part_row, row, head, group, blocks, first_token;

  __device__ WalkPlace(uint4* shared, const WalkProblem& p) {
    scales = reinterpret_cast<float*>(shared);
    weights = scales + kWalkStages * kScanTokens;
    kept = weights + kWalkStages * kScanTokens;
    full = shared_address(kept + kWalkStages * 4);
    empty = full + 8 * kWalkStages;
    stages = (empty + 8 * kWalkStages + 1023) & ~1023u;
    backward = blockIdx.y;
    part_row = static_cast<int>(blockIdx.x) / p.H;
    row = p.first_row + part_row;
    head = static_cast<int>(blockIdx.x) % p.H;
    group = head / p.heads_per_group;
    blocks = p.blocks;
    first_token = p.first_block * kScanTokens;
  }

  __device__ int block(int step) const { return backward ? blocks - 1 - step : step; }
  __device__ int token(int step) const { return first_token + block(step) * kScanTokens; }
  __device__ SharedAddress stage(int step) const { return stages + step % kWalkStages * kStageBytes; }
  __device__ void wait_full(int step) const { barrier_wait(full + step % kWalkStages * 8, step / kWalkStages % 2); }
  __device__ void wait_empty(int step) const {
    barrier_wait(empty + step % kWalkStages * 8, step / kWalkStages % 2 ^ 1);
  }
};

template <int N>
__device__ void fetch_walk(const WalkPlace<N>& at, const CUtensorMap& u, const CUtensorMap& v,
                           const CUtensorMap& other_u, const CUtensorMap& other_v) {
  using Place = WalkPlace<N>;
  for (int s = 0; s < at.blocks; ++s) {
    at.wait_empty(s);
    const SharedAddress full = at.full + s % kWalkStages * 8;
    const int token = at.token(s);
    barrier_arrive_expecting(full, Place::kStageBytes);
    const auto load = [&](const CUtensorMap& of_head, const CUtensorMap& of_group, SharedAddress to) {
      load_tokens(&of_head, to, full, 0, at.head, token, at.row);
#pragma unroll
      for (int i = 0; i < Place::kBoxes; ++i) {
        load_tokens(&of_group, to + (i + 1) * kScanBoxBytes, full, 64 * i, at.group, token, at.row);
      }
    };
    load(other_u, other_v, at.stage(s) + Place::kOther);
    load(u, v, at.stage(s));
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
  reader.fetch(at.token(min(warp, at.blocks - 1)), lane, next);
  for (int s = warp; s < at.blocks; s += kWalkDecayWarps) {
    const float v[2] = {reader.value(next[0]) + bias, reader.value(next[1]) + bias};
    reader.fetch(at.token(min(s + kWalkDecayWarps, at.blocks - 1)), lane, next);
    float step[2], slope[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = at.token(s) + 2 * lane + i < p.T;
      const float raw = p.dt_softplus ? soft_plus(v[i]) : v[i];
      step[i] = there ? clamp_step(raw, p.dt_min, p.dt_max) : 0.0f;
      slope[i] = !there || raw < p.dt_min || raw > p.dt_max ? 0.0f : p.dt_softplus ? 1.0f / (1.0f + expf(-v[i])) : 1.0f;
    }
    float end;
    const float2 since = running_sums(step[0], step[1], lane, end);
    const float2 totals = {since.x * A, since.y * A};
    const float2 enter = {exp2_fast(totals.x), exp2_fast(totals.y)};
    const float2 leave = {exp2_fast((end - since.x) * A) * step[0], exp2_fast((end - since.y) * A) * step[1]};
    at.wait_empty(s);
    const int stage = s % kWalkStages;
    reinterpret_cast<float2*>(at.scales + stage * kScanTokens)[lane] = at.backward ? enter : leave;
    reinterpret_cast<float2*>(at.weights + stage * kScanTokens)[lane] =
        at.backward ? float2{leave.x * (end - since.x), leave.y * (end - since.y)}
                    : float2{enter.x * since.x, enter.y * since.y};
    if (lane == 0) at.kept[4 * stage] = exp2_fast(end * A);
    __syncwarp();
    if (lane == 0) barrier_arrive(at.full + stage * 8);
    if (!at.backward) {
      ScanRows& to = p.rows[(int64_t(at.part_row) * at.blocks + at.block(s)) * p.H + at.head];
      reinterpret_cast<float2*>(to.total)[lane] = totals;
      reinterpret_cast<float2*>(to.step)[lane] = {step[0], step[1]};
      reinterpret_cast<float2*>(to.slope)[lane] = {slope[0], slope[1]};
    }
  }
}

// load_scaled() in two parts, the second what the rounding of the first leaves out.
template <typename T>
__device__ __forceinline__ void load_split(SharedAddress x, const float* scales, int t,
                                           uint32_t (&high)[kScanTokens / 16][4],
                                           uint32_t (&low)[kScanTokens / 16][4]) {
  scale_pairs<T>(x, scales, t, [&](int k, int i, float2 v) {
    high[k][i] = pack_pair(T(), v.x, v.y);
    const float2 rounded = unpack_pair(T(), high[k][i]);
    low[k][i] = pack_pair(T(), v.x - rounded.x, v.y - rounded.y);
  });
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
  const int h_at = in_box(16 * warp + lane % 16, lane / 16);
  const int blocks = uniform(at.blocks);
  float lost[2] = {};
  for (int s = 0; s < blocks; ++s) {
    at.wait_full(s);
    const SharedAddress stage = at.stage(s);
    const int of_stage = s % kWalkStages * kScanTokens;

    // What the block makes of the state, in its share of dA: for what the rounding of the state takes from that.
    uint32_t a[kSteps][4], high[kSteps][4], low[kSteps][4];
    load_scaled<T>(stage + Place::kOther + u_at, at.weights + of_stage, t, a);
    float gives[N / 2];
    const uint64_t other_v = wgmma_rows_descriptor(stage + Place::kOut, kScanBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma_rows(T(), gives, a[k], other_v + k * 16 * 128 / 16, k > 0);
    wgmma_commit();
    load_split<T>(stage + u_at, at.scales + of_stage, t, high, low);
    const float kept = at.kept[s % kWalkStages * 4];
    wgmma_wait<0>();
    pin(gives);
    pin(a);

    uint32_t before[N / 4];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      before[i] = pack_pair(T(), h[2 * i], h[2 * i + 1]);
      const float2 rounded = unpack_pair(T(), before[i]);
      lost[0] += (h[2 * i] - rounded.x) * gives[2 * i];
      lost[1] += (h[2 * i + 1] - rounded.y) * gives[2 * i + 1];
      h[2 * i] *= kept;
      h[2 * i + 1] *= kept;
    }
    const uint64_t v = wgmma_rows_descriptor(stage + kScanBoxBytes, kScanBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma_rows(T(), h, high[k], v + k * 16 * 128 / 16, 1);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma_rows(T(), h, low[k], v + k * 16 * 128 / 16, 1);
    wgmma_commit();

    // Every warp stores its own rows, in the place of an operand that all warps have done with.
    named_barrier(1, kScanWarpgroup);
    store_boxes(stage + Place::kOut, h_at, before);
    copy_engine_fence();
    __syncwarp();
    if (lane == 0) {
      const int64_t of_block = (int64_t(at.part_row) * blocks + at.block(s)) * p.H + at.head;
#pragma unroll
      for (int i = 0; i < Place::kBoxes; ++i) {
        store_box(&states, stage + Place::kOut + i * kScanBoxBytes + 16 * warp * 128, 64 * i,
                  static_cast<int>(of_block * kHeaddim + 16 * warp));
      }
      commit_stores();
      wait_for_stores_to_read();
    }
    wgmma_wait<0>();
    pin(h);
    pin(high);
    pin(low);
    __syncwarp();
    if (lane == 0) barrier_arrive(at.empty + s % kWalkStages * 8);
  }
  if (at.backward && p.dinitial) store_state<N>(p.dinitial + of_state, row, t, h);
  const float of_warp = warp_reduce(lost[0] + lost[1], Sum());
  if (lane == 0) {
    p.lost[(int64_t(at.row) * kLostRows + 4 * at.backward + warp) * p.H + at.head] = of_warp;
    wait_for_stores();
  }
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
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp < kWalkDecayWarps) {
      decays_of_walk(at, p, warp, threadIdx.x % 32);
    } else if (threadIdx.x == kWalkDecayWarps * 32) {
      at.backward ? fetch_walk(at, dy, C, x, B) : fetch_walk(at, x, B, dy, C);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    walk<T, N>(at, p, at.backward ? dh : h);
  }
#endif
}

}  // namespace bitkernels::cuda
