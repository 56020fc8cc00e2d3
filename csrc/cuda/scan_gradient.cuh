// What the roles of the second kernel of the backward scan share. A thread block takes 64 tokens and some heads of a
// group, one after the other: with the state before the block and the gradient of the one after it, nothing else of
// the sequence is needed. See docs/kernels/ssd_scan.md.
#pragma once

#include "reduce.cuh"
#include "scan_walk.cuh"

namespace bitkernels::cuda {

constexpr int kGradientStages = 3;  // heads in shared memory
constexpr int kGradientThreads = 4 * kScanWarpgroup;
constexpr int kGradientWarps = 12;  // that read stages, beside the one that adds up

struct GradientProblem {
  const ScanRows* rows;
  const float *A, *D;
  float* head_sums;
  void *ddt, *dB, *dC;
  DType dt_dtype;
  bool parts;  // dB and dC are sums of a part of the heads, in float32
  int64_t batch;
  int T, H, G, splits;
  int blocks, first_block;  // of this part of time
  int first_row;            // of the batch, of those whose states are held
};

// Of one head, on their way to the warp that adds up: what tokens j, i or decays k get from where.
struct HeadSums {
  float crossing[4][kScanTokens];  // k: of pairs j < k <= i, from every warp's j
  float pairs[kScanTokens];        // j: of its weights in all i, without its step size
  float leave[kScanTokens];        // j: of what it adds to the state after the block, without its step size
  float enter[kScanTokens];        // i: of what the state before the block gives
  float both[4];                   // of what the state before gives the state after, without its decay
  float skip[4];                   // x dy
};

template <int N>
struct GradientPlace {
  static constexpr int kBoxes = N / 64;
  static constexpr int kStateBytes = kBoxes * kScanBoxBytes;
  static constexpr int kDy = kScanBoxBytes;  // in a stage, after x
  static constexpr int kH = 2 * kScanBoxBytes;
  static constexpr int kDh = kH + kStateBytes;
  static constexpr int kStageBytes = kDh + kStateBytes;
  static constexpr int kBarriers = 2 * kGradientStages + 7;
  static constexpr int kWeightBytes = kScanWarpgroup * 8 * sizeof(float4);
  static constexpr int kPlainBytes =
      kGradientStages * sizeof(ScanRows) + 2 * sizeof(HeadSums) + kWeightBytes + 8 * kBarriers;
  static constexpr int kSharedBytes =
      1024 + (kPlainBytes + 1023) / 1024 * 1024 + kGradientStages * kStageBytes + 2 * kStateBytes + 3 * kScanBoxBytes;

  float4* CB;             // [8][128] (C B^T)^T, as the sums of a product
  ScanRows* rows;         // [stages]
  HeadSums* sums;         // [2]
  SharedAddress full;     // [stages] barriers: a head has landed
  SharedAddress empty;    // [stages]: and was read
  SharedAddress summed;   // [2]: sums of a head are there
  SharedAddress added;    // [2]: and were read
  SharedAddress weighed;  // weights of a head are there
  SharedAddress applied;  // and were read
  SharedAddress ready;    // B and C have landed
  SharedAddress stages;   // x, dy, h, dh as boxes of 64 columns
  SharedAddress B, C;     // as boxes of 64 columns
  SharedAddress out;      // [tokens, 64]: dx
  SharedAddress weights;  // [j, i] in 16 bits: (C B^T)^T * decay * dt, in the end the gradient of (C B^T)^T
  SharedAddress ones;     // [k, i]: one where i >= k
  int block, token, part_row, row, group, split, first_head, heads;

  __device__ GradientPlace(uint4* shared, const GradientProblem& p) {
    CB = reinterpret_cast<float4*>(shared);
    rows = reinterpret_cast<ScanRows*>(CB + kScanWarpgroup * 8);
    sums = reinterpret_cast<HeadSums*>(rows + kGradientStages);
    full = shared_address(sums + 2);
    empty = full + 8 * kGradientStages;
    summed = empty + 8 * kGradientStages;
    added = summed + 16;
    weighed = added + 16;
    applied = weighed + 8;
    ready = applied + 8;
    stages = (ready + 8 + 1023) & ~1023u;
    B = stages + kGradientStages * kStageBytes;
    C = B + kStateBytes;
    out = C + kStateBytes;
    weights = out + kScanBoxBytes;
    ones = weights + kScanBoxBytes;
    block = static_cast<int>(blockIdx.x) % p.blocks;
    token = (p.first_block + block) * kScanTokens;
    part_row = static_cast<int>(blockIdx.x) / p.blocks;
    row = p.first_row + part_row;
    split = blockIdx.y;
    group = blockIdx.z;
    const int in_group = p.H / p.G;
    const int share = (in_group + p.splits - 1) / p.splits;
    first_head = group * in_group + split * share;
    heads = max(min(share, in_group - split * share), 0);
  }

  // The tile of a head in the states, and of its rows.
  __device__ int64_t place(const GradientProblem& p, int head) const {
    return (int64_t(part_row) * p.blocks + block) * p.H + head;
  }
  __device__ SharedAddress stage(int n) const { return stages + n % kGradientStages * kStageBytes; }
  __device__ void wait_full(int n) const { barrier_wait(full + n % kGradientStages * 8, n / kGradientStages % 2); }
  __device__ void wait_empty(int n) const {
    barrier_wait(empty + n % kGradientStages * 8, n / kGradientStages % 2 ^ 1);
  }
  // Lane 0 of every warp says that it has read a stage.
  __device__ void release(int n, int lane) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + n % kGradientStages * 8);
  }
  // Where the sums of a head go.
  __device__ HeadSums& wait_added(int n) const {
    barrier_wait(added + n % 2 * 8, n / 2 % 2 ^ 1);
    return sums[n % 2];
  }
  __device__ void say_summed(int n, int lane) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(summed + n % 2 * 8);
  }
};

// Over the four lanes that hold a row of a product.
__device__ inline float row_sum(float v) { return add_lanes(v, 1, 4); }

// Where a step of a product begins in an operand [64, N] whose rows are not summed over.
__device__ constexpr int step_in_boxes(int k) { return (k / 4 * kScanBoxBytes + k % 4 * 32) / 16; }
// And in one of which they are.
__device__ constexpr int step_in_rows(int k) { return k * 16 * 128 / 16; }

template <int N>
__device__ void fetch_heads(const GradientPlace<N>& at, const GradientProblem& p, const CUtensorMap& x,
                            const CUtensorMap& dy, const CUtensorMap& B, const CUtensorMap& C, const CUtensorMap& h,
                            const CUtensorMap& dh) {
  using Place = GradientPlace<N>;
  barrier_arrive_expecting(at.ready, 2 * Place::kStateBytes);
#pragma unroll
  for (int i = 0; i < Place::kBoxes; ++i) {
    load_tokens(&B, at.B + i * kScanBoxBytes, at.ready, 64 * i, at.group, at.token, at.row);
    load_tokens(&C, at.C + i * kScanBoxBytes, at.ready, 64 * i, at.group, at.token, at.row);
  }
  for (int n = 0; n < at.heads; ++n) {
    at.wait_empty(n);
    const SharedAddress stage = at.stage(n), full = at.full + n % kGradientStages * 8;
    const int head = at.first_head + n;
    const int64_t place = at.place(p, head);
    const int state_row = static_cast<int>(place * kHeaddim);
    barrier_arrive_expecting(full, Place::kStageBytes + sizeof(ScanRows));
    load_bytes(shared_address(at.rows + n % kGradientStages), p.rows + place, sizeof(ScanRows), full);
    load_tokens(&x, stage, full, 0, head, at.token, at.row);
    load_tokens(&dy, stage + Place::kDy, full, 0, head, at.token, at.row);
#pragma unroll
    for (int i = 0; i < Place::kBoxes; ++i) {
      load_box(&h, stage + Place::kH + i * kScanBoxBytes, full, 64 * i, state_row);
      load_box(&dh, stage + Place::kDh + i * kScanBoxBytes, full, 64 * i, state_row);
    }
  }
}

// Adds up what the others found of a head: ddt, and its parts of dA, ddt_bias and dD. A lane has two tokens.
template <int N>
__device__ void add_up(const GradientPlace<N>& at, const GradientProblem& p, int lane) {
  for (int n = 0; n < at.heads; ++n) {
    const int head = at.first_head + n;
    const float A = p.A[head];
    barrier_wait(at.summed + n % 2 * 8, n / 2 % 2);
    at.wait_full(n);
    const ScanRows& rows = at.rows[n % kGradientStages];
    const HeadSums& sums = at.sums[n % 2];
    const auto two = [&](const float* v) { return reinterpret_cast<const float2*>(v)[lane]; };
    const float2 step = two(rows.step), slope = two(rows.slope);
    const float kept = exp2_fast(rows.total[kScanTokens - 1]);
    float2 decay = two(sums.crossing[0]);
#pragma unroll
    for (int w = 1; w < 4; ++w) {
      const float2 v = two(sums.crossing[w]);
      decay.x += v.x;
      decay.y += v.y;
    }
    // Of decay k, besides pairs: what tokens j < k gave the state after the block, and the one before it y_i from
    // i = k on, and the one before it the one after it.
    const float2 pairs = two(sums.pairs), leave = two(sums.leave), enter = two(sums.enter);
    const float added[2] = {leave.x * step.x, leave.y * step.y};
    float before = added[0] + added[1], after = enter.x + enter.y;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const float lower = __shfl_up_sync(0xffffffff, before, distance);
      const float upper = __shfl_down_sync(0xffffffff, after, distance);
      if (lane >= distance) before += lower;
      if (lane + distance < 32) after += upper;
    }
    before = __shfl_up_sync(0xffffffff, before, 1);
    after = __shfl_down_sync(0xffffffff, after, 1);
    if (lane == 0) before = 0.0f;
    if (lane == 31) after = 0.0f;
    const float through = kept * (sums.both[0] + sums.both[1] + sums.both[2] + sums.both[3]);
    decay.x += before + (after + enter.y + enter.x) + through;
    decay.y += before + added[0] + (after + enter.y) + through;
    const float ddt[2] = {(pairs.x + leave.x + A * decay.x) * slope.x, (pairs.y + leave.y + A * decay.y) * slope.y};
    const float skip = sums.skip[0] + sums.skip[1] + sums.skip[2] + sums.skip[3];
    float dA = decay.x * step.x + decay.y * step.y;
    float dbias = ddt[0] + ddt[1];
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(at.added + n % 2 * 8);
      barrier_arrive(at.empty + n % kGradientStages * 8);
    }
    const int token = at.token + 2 * lane;
    const int64_t first = (int64_t(at.row) * p.T + token) * p.H + head;
    if (token < p.T) store(p.ddt, p.dt_dtype, first, ddt[0]);
    if (token + 1 < p.T) store(p.ddt, p.dt_dtype, first + p.H, ddt[1]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      dA += __shfl_xor_sync(0xffffffff, dA, distance);
      dbias += __shfl_xor_sync(0xffffffff, dbias, distance);
    }
    if (lane == 0) {
      float* to = p.head_sums + ((int64_t(at.row) * p.blocks + at.block) * p.H + head) * 3;
      to[0] = dA;
      to[1] = dbias;
      to[2] = skip;
    }
  }
}

}  // namespace bitkernels::cuda
