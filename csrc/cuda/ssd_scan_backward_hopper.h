// The backward SSD scan for Hopper. What it does not take, the Triton kernels do (bitkernels/triton).
#pragma once

#include "ssd_scan_hopper.h"

namespace bitkernels::cuda {

struct SsdScanBackward {
  ScanTensor dy, x;           // [B, T, H, 64] dtype
  ScanTensor B, C;            // [B, T, G, N] dtype
  ScanTensor dt;              // [B, T, H] dt_dtype, in strides of its own
  const float *A, *dt_bias;   // [H], the second or null
  const float* D;             // [H] or null
  const float* initial;       // [B, H, 64, N] or null
  const float* dfinal;        // [B, H, 64, N] or null
  void* states;               // [2, rows, blocks, H, 64, N] dtype: h before every block, dh after it
  float* decays;              // [rows, blocks, H, 3, 64], see ScanRows
  float* head_sums;           // [B, blocks, H, 3]: parts of dA, ddt_bias and dD
  float *dB_parts, *dC_parts; // [splits, B, T, G, N], or null with one split
  void* dx;                   // [B, T, H, 64] dtype
  void* ddt;                  // [B, T, H] dt_dtype
  void *dB, *dC;              // [B, T, G, N] dtype
  float *dA, *ddt_bias, *dD;  // [H], the last two or null
  float* dinitial;            // [B, H, 64, N] or null
  DType dtype, dt_dtype;
  bool dt_softplus;
  float dt_min, dt_max;
  int64_t batch, T, H, G, N;
  int64_t rows;    // of the batch whose states are held at once
  int64_t splits;  // thread blocks over which the heads of a group are spread
};
// All of dtype lies on 16-byte boundaries, and so do the strides; dtype is 16 bits wide, N 64 or 128, T at least 1.
void ssd_scan_backward_hopper(const SsdScanBackward&, Executor);

}  // namespace bitkernels::cuda
