// The kernels of the Mamba-2 block: scan, step, causal convolution, gated norm. No torch here.
//
// On CUDA the step is this header's. The forwards of convolution and norm are those of cuda/causal_conv1d_cuda.h and
// cuda/rms_norms_cuda.h, the scan that of cuda/ssd_scan_hopper.h, or Triton's (bitkernels/triton), where the other
// backwards run, too; that of the scan may call cuda/ssd_scan_backward_hopper.h.
//
// Activations are fp32, bf16 or fp16 with fp32 arithmetic, or fp64 throughout. "acc" below is the type of that
// arithmetic: float, or double where dtype is kFloat64.
#pragma once

#include "kernels.h"

namespace bitkernels::BITKERNELS_BACKEND {

// [batch, time, head, inner] with strides in elements; the innermost is 1.
struct Strided {
  const void* data = nullptr;
  int64_t batch = 0, time = 0, head = 0;
};

// A run of tokens with one history: a batch row, or one of the sequences packed into a batch of one.
struct Sequence {
  int64_t batch, begin, length;
  int64_t first_chunk;  // its chunks are numbered on from here
};

struct SsdScan {
  Strided x;                   // [B, T, H, P] dtype
  Strided dt;                  // [B, T, H] acc
  Strided B, C;                // [B, T, G, N] dtype
  Strided z;                   // [B, T, H, P] dtype or null
  const void* A;               // [H] acc
  const void* D;               // [H] or [H, P] acc, or null
  const void* dt_bias;         // [H] acc or null
  const void* initial_states;  // [S, H, P, N] acc or null
  const int64_t* seq_idx;      // [B, T] or null: the state restarts from zero where it changes
  void* y;                     // [B, T, H, P] dtype
  void* final_states;          // [S, H, P, N] acc
  const Sequence* sequences;   // [S]
  void* workspace;             // ssd_scan_workspace() bytes
  DType dtype;
  bool D_per_channel, dt_softplus;
  double dt_min, dt_max;
  int64_t S, T, H, P, G, N;
};
int64_t ssd_scan_chunks(int64_t length);
int64_t ssd_scan_workspace(const SsdScan&);
void ssd_scan(const SsdScan&, Executor);

struct SsdScanBackward {
  SsdScan forward;            // y and final_states are null
  Strided dy;                 // [B, T, H, P] dtype
  const void* dfinal_states;  // [S, H, P, N] acc or null
  void *dx, *dz;              // [B, T, H, P] dtype; dz null without z
  void *dB, *dC;              // [B, T, G, N] dtype
  void* ddt;                  // [B, T, H] acc
  void *dA, *ddt_bias;        // [H] acc; ddt_bias null without dt_bias
  void* dD;                   // as D
  void* dinitial_states;      // [S, H, P, N] acc, null without initial_states
};
int64_t ssd_scan_backward_workspace(const SsdScanBackward&);
void ssd_scan_backward(const SsdScanBackward&, Executor);

// One token of the scan; the time stride of every view is unused.
struct SsdStep {
  void* state;                   // [slots, H, P, N] state_dtype, strides below, innermost 1
  Strided x, dt, B, C;           // [B, H, P] dtype, [B, H] dt_dtype, [B, G, N] dtype twice
  Strided z;                     // [B, H, P] dtype or null
  const void* A;                 // [H] acc
  const void* D;                 // [H] or [H, P] acc, or null
  const void* dt_bias;           // [H] acc or null
  const int64_t* state_indices;  // [B] the slot of each request, negative for none; null: its index
  // [B] each, or both null: 16-bit states are rounded stochastically, else to nearest.
  const int64_t *seed, *position;
  void* y;  // [B, H, P] dtype
  DType dtype, state_dtype, dt_dtype;
  bool D_per_channel, dt_softplus;
  double dt_min, dt_max;
  int64_t slots, state_batch, state_head, state_row;
  int64_t batch, H, P, G, N;
  bool after_projection = false;  // mamba2_in_step, which has asked for the states, runs right before
};
void ssd_step(const SsdStep&, Executor);

struct CausalConv1d {
  Strided x;                  // [B, T, C] dtype
  const void* weight;         // [C, W] acc
  const void* bias;           // [C] acc or null
  const void* initial;        // [S, W - 1, C] dtype or null
  const int64_t* seq_idx;     // [B, T] or null
  void* y;                    // [B, T, C] dtype
  const Sequence* sequences;  // [S]
  DType dtype;
  bool silu;
  int64_t S, T, C, W;
};
int64_t causal_conv1d_chunks(int64_t length);
void causal_conv1d(const CausalConv1d&, Executor);

struct CausalConv1dBackward {
  CausalConv1d forward;   // y is null
  Strided dy;             // [B, T, C] dtype
  void* dx;               // [B, T, C] dtype
  void *dweight, *dbias;  // [C, W], [C] acc; dbias null without bias
  void* dinitial;         // [S, W - 1, C] dtype, null without initial
  void* workspace;        // causal_conv1d_backward_workspace() bytes
};
int64_t causal_conv1d_backward_workspace(const CausalConv1dBackward&);
void causal_conv1d_backward(const CausalConv1dBackward&, Executor);

// out[M, width] = RMSNorm(x * silu(z)) * weight in groups of group_size; rows of x and z are strided.
struct GatedRmsNorm {
  const void *x, *z;   // [M, width] dtype
  const void* weight;  // [width] acc
  void* out;           // [M, width] dtype
  DType dtype;
  double eps;
  int64_t M, width, group_size, x_row, z_row;
};
void gated_rms_norm(const GatedRmsNorm&, Executor);

struct GatedRmsNormBackward {
  GatedRmsNorm forward;  // out is null
  const void* dy;        // [M, width] dtype
  int64_t dy_row;
  void *dx, *dz;    // [M, width] dtype
  void* dweight;    // [width] acc
  void* workspace;  // gated_rms_norm_backward_workspace() bytes
};
int64_t gated_rms_norm_backward_workspace(const GatedRmsNormBackward&);
void gated_rms_norm_backward(const GatedRmsNormBackward&, Executor);

}  // namespace bitkernels::BITKERNELS_BACKEND
