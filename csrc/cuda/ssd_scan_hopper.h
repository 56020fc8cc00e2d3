// The forward SSD scan for Hopper. What it does not take, the Triton kernels do (bitkernels/triton/ssd_scan.py).
#pragma once

#include "kernels.h"

namespace bitkernels::cuda {

// [B, T, heads or groups, inner], strides in elements; the innermost is 1.
struct ScanTensor {
  const void* data;
  int64_t batch, time, head;
};

// Thread blocks that share a sequence, at most.
constexpr int kMostScanParts = 4;

struct HopperScan {
  ScanTensor x;                 // [B, T, H, 64] dtype
  ScanTensor B, C;              // [B, T, G, N] dtype
  ScanTensor z;                 // [B, T, H, 64] dtype or null
  ScanTensor dt;                // [B, T, H] dt_dtype, in strides of its own
  const float* A;               // [H]
  const float* D;               // by strides [H, 64], or null
  const float* dt_bias;         // [H] or null
  const float* initial_states;  // [B, H, 64, N] or null
  void* y;                      // [B, T, H, 64] dtype, or null: the final states alone
  float* final_states;          // [B, H, 64, N] or null
  DType dtype, dt_dtype;
  int64_t D_head, D_channel;
  bool dt_softplus;
  float dt_min, dt_max;
  int64_t batch, T, H, G, N;
  int64_t parts;       // of a sequence, each made by a thread block
  int64_t turns;       // sequences whose later parts a thread block makes
  double states_cost;  // of 64 tokens that only the state passes, in such with outputs
};
// How thread blocks share the sequences of a scan, as above. No parts: the device does not take it.
struct ScanDivision {
  int64_t parts;
  double states_cost;
  int64_t turns;
};
ScanDivision divide_scan(int64_t batch, int64_t T, int64_t H, bool gated);

// x, B, C, z, initial_states and y lie on 16-byte boundaries, and so do the strides of the first
// four, which are not zero; dtype is 16 bits wide, N 64 or 128, T at least 1, and every part has a block of 64 tokens.
void ssd_scan_hopper(const HopperScan&, Executor);

}  // namespace bitkernels::cuda
