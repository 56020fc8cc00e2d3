// What the roles of the scan kernel share: the problem, the stages in shared memory, their barriers.
#pragma once

#include "hopper.cuh"
#include "ptx.cuh"
#include "ssd_scan_hopper.h"

namespace bitkernels::cuda {

constexpr int kHeaddim = 64;
constexpr int kScanTokens = 64;                   // of a block
constexpr int kScanStages = 4;                    // blocks in shared memory
constexpr int kScanBoxBytes = kScanTokens * 128;  // 64 tokens, or rows of a state, times 64 columns
constexpr int kOutputGroups = 2;                  // warpgroups, which take turns with the blocks
constexpr int kGateBoxes = 3;                     // of gates, in whose places gated outputs are made
constexpr int kDecayWarps = 2;
constexpr int kScanWarpgroup = 128;
constexpr int kScanThreads = kScanWarpgroup * (2 + kOutputGroups);

// Of one head and block. Decays are kept as their binary logarithms, `total` since the block began.
struct ScanDecays {
  float4 pairs[kScanTokens / 2];  // of two neighbouring tokens: total, total, step size, step size
  float enter[kScanTokens];       // what is left at a token of the state before the block
  float leave[kScanTokens];       // what a token's B x adds to the state after the block
  float kept;                     // what is left of the state after the block
  float unused[3];
};

// What remains of a HopperScan beside tensor maps.
struct ScanProblem {
  const void* dt;
  const float *A, *D, *dt_bias, *initial_states;
  float* final_states;
  int64_t dt_batch, dt_time, dt_head;
  int64_t D_head, D_channel;
  float dt_min, dt_max;
  DType dt_dtype;
  bool dt_softplus;
  int T, H, heads_per_group, blocks;
  int begins[kMostScanParts + 1];  // of the parts of a sequence, in blocks
};

// The head and part a thread block walks through, and where things are in its shared memory.
template <int N>
struct ScanPlace {
  static constexpr int kBoxes = N / 64;
  static constexpr int kStateBytes = kBoxes * kScanBoxBytes;
  static constexpr int kB = kScanBoxBytes;  // in a stage, after x
  static constexpr int kC = kB + kBoxes * kScanBoxBytes;
  static constexpr int kStageBytes = kC + kBoxes * kScanBoxBytes;
  static constexpr int kBarriers = 2 * kScanStages + (2 + kGateBoxes) * kOutputGroups + kGateBoxes;
  static constexpr int kPlainBytes = sizeof(ScanDecays) * kScanStages + sizeof(float) * kHeaddim + 8 * kBarriers;
  static constexpr size_t shared_bytes(bool gated) {
    return 1024 + (kPlainBytes + 1023) / 1024 * 1024 + kScanStages * kStageBytes + kOutputGroups * kStateBytes +
           (gated ? kGateBoxes : kOutputGroups) * kScanBoxBytes;
  }

  ScanDecays* decays;     // [stages]
  float* D;               // [64]
  SharedAddress full;     // [stages] barriers: a stage has landed
  SharedAddress empty;    // [stages]: and was read
  SharedAddress written;  // [output groups]: the state before a block is there
  SharedAddress read;     // [output groups]: and was read
  SharedAddress gates;    // [output groups x gate boxes]: the gates of a block are there
  SharedAddress left;     // [gate boxes]: the outputs in their places have left
  SharedAddress stages;   // x, B, C as boxes of 64 columns
  SharedAddress states;   // [output groups] of [64, N], in boxes of 64 columns
  SharedAddress outputs;  // [output groups, or gate boxes] of [tokens, 64]
  int row, head, group;
  int begin, end;  // of the blocks it makes outputs of; only the state passes those before

  __device__ ScanPlace(uint4* shared, const ScanProblem& p) {
    decays = reinterpret_cast<ScanDecays*>(shared);
    D = reinterpret_cast<float*>(decays + kScanStages);
    full = shared_address(D + kHeaddim);
    empty = full + 8 * kScanStages;
    written = empty + 8 * kScanStages;
    read = written + 8 * kOutputGroups;
    gates = read + 8 * kOutputGroups;
    left = gates + 8 * kOutputGroups * kGateBoxes;
    stages = (left + 8 * kGateBoxes + 1023) & ~1023u;
    states = stages + kScanStages * kStageBytes;
    outputs = states + kOutputGroups * kStateBytes;
    row = static_cast<int>(blockIdx.x) / p.H;
    head = static_cast<int>(blockIdx.x) % p.H;
    group = head / p.heads_per_group;
    begin = p.begins[blockIdx.y];
    end = p.begins[blockIdx.y + 1];
  }

  // Lane 0 of every warp of a warpgroup says that it has read a stage.
  __device__ void release(int block, int lane) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + block % kScanStages * 8);
  }
  __device__ SharedAddress stage(int block) const { return stages + block % kScanStages * kStageBytes; }
  // Where the gates of a block are, then its outputs. Each barrier is of one output group, which sees its every phase.
  __device__ int gate_box(int block) const { return (block - begin) % kGateBoxes; }
  __device__ SharedAddress gate_barrier(int block) const {
    return gates + (block - begin) % (kOutputGroups * kGateBoxes) * 8;
  }
  __device__ void wait_full(int block) const { barrier_wait(full + block % kScanStages * 8, block / kScanStages % 2); }
  // The place of a block may be written: at once the first time.
  __device__ void wait_empty(int block) const {
    barrier_wait(empty + block % kScanStages * 8, block / kScanStages % 2 ^ 1);
  }
};

// Where 16-byte chunk `chunk` of a row of a box is, as the copy engine and wgmma have it: the byte of chunk c is that
// of chunk 0 ^ 16 c.
__device__ inline int in_box(int row, int chunk) { return row * 128 + (chunk ^ row % 8) * 16; }

}  // namespace bitkernels::cuda
