// The forward of the causal convolution. The rest of it runs on Triton (bitkernels/triton/causal_conv1d.py).
#pragma once

#include "kernels.h"

namespace bitkernels::cuda {

struct Convolution {
  const void* x;                     // [B, T, C] dtype, the last axis dense
  const void* weight;                // [C, W] weight_dtype
  const void* bias;                  // [C] bias_dtype or null
  const void* initial;               // [S, W - 1, C] initial_dtype by strides, the last axis dense, or null
  const void *seq_idx, *cu_seqlens;  // [B, T] and [S + 1], int64 or int32, or null
  void* y;                           // [B, T, C] dtype
  DType dtype, weight_dtype, bias_dtype, initial_dtype;
  bool wide_seq_idx, wide_cu_seqlens;  // int64
  bool silu;
  int64_t batch, T, C, W, sequences;
  int64_t x_batch, x_time, initial_sequence, initial_time;
};
void convolve(const Convolution&, Executor);

}  // namespace bitkernels::cuda
