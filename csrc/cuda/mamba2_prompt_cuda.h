// The states of a layer after many tokens, into its caches.
#pragma once

#include "kernels.h"

namespace bitkernels::cuda {

struct PromptStates {
  const float* final_states;  // [batch, heads * P * N]
  void* ssm;                  // the same, ssm_dtype, sequences ssm_batch apart
  const void* inputs;         // [batch, T, channels] dtype, by strides, of the convolution
  void* conv;                 // [batch, W - 1, channels] conv_dtype, by strides: the last W - 1 inputs
  DType dtype, ssm_dtype, conv_dtype;
  int64_t batch, state, T, channels, W;
  int64_t ssm_batch, input_batch, input_time, conv_batch, conv_time;
};
void store_states(const PromptStates&, Executor);

}  // namespace bitkernels::cuda
