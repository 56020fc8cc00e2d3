// The backward SSD scan for Hopper. What it does not take, the Triton kernels do (bitkernels/triton).
#pragma once

#include "ssd_scan_hopper.h"

namespace bitkernels::cuda {

struct HopperScanBackward {
  ScanTensor dy, x;           // [B, T, H, 64] dtype
  ScanTensor B, C;            // [B, T, G, N] dtype
  ScanTensor z;               // [B, T, H, 64] dtype or null
  ScanTensor dt;              // [B, T, H] dt_dtype, in strides of its own
  const float *A, *dt_bias;   // [H], the second or null
  const float* D;             // [H] or null
  const float* initial;       // [B, H, 64, N] or null
  const float* dfinal;        // [B, H, 64, N] or null
  void* dx;                   // [B, T, H, 64] dtype
  void* dz;                   // [B, T, H, 64] dtype, with z
  void* ddt;                  // [B, T, H] dt_dtype
  void *dB, *dC;              // [B, T, G, N] dtype
  float *dA, *ddt_bias, *dD;  // [H], the last two or null
  float* dinitial;            // [B, H, 64, N] or null
  void* workspace;
  DType dtype, dt_dtype;
  bool dt_softplus;
  float dt_min, dt_max;
  int64_t batch, T, H, G, N;
  int64_t rows;    // of the batch whose states are held at once
  int64_t length;  // tokens of a part of time, of which alone they are held: a multiple of 64
  int64_t splits;  // thread blocks over which the heads of a group are spread
};
// All of dtype lies on 16-byte boundaries, initial and dfinal too, and so do the strides of dtype, which are not zero;
// dtype is 16 bits wide, N 64 or 128, T at least 1.
void ssd_scan_backward_hopper(const HopperScanBackward&, Executor);

// Bytes it wants as workspace, on a 16-byte boundary.
int64_t ssd_scan_backward_hopper_workspace(const HopperScanBackward&);

}  // namespace bitkernels::cuda
