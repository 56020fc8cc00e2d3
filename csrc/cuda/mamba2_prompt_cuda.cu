#include "launch.cuh"
#include "mamba2_prompt_cuda.h"
#include "types.cuh"

namespace bitkernels::cuda {
namespace {

constexpr int kThreads = 256;

// A block's second index is the sequence. Threads past the elements of the state have a channel of the convolution.
__global__ void __launch_bounds__(kThreads) store_states_kernel(const __grid_constant__ PromptStates p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, sequence = blockIdx.y;
  if (i < p.state) return store(p.ssm, p.ssm_dtype, sequence * p.ssm_batch + i, p.final_states[sequence * p.state + i]);
  const int64_t channel = i - p.state, before = p.W - 1;
  if (channel >= p.channels) return;
  const int64_t conv = sequence * p.conv_batch + channel, input = sequence * p.input_batch + channel;
  for (int64_t tap = 0; tap < before; ++tap) {
    const int64_t t = p.T - before + tap;  // below zero: an input before these
    const float v = t < 0 ? load(p.conv, p.conv_dtype, conv + (tap + p.T) * p.conv_time)
                          : load(p.inputs, p.dtype, input + t * p.input_time);
    store(p.conv, p.conv_dtype, conv + tap * p.conv_time, v);
  }
}

}  // namespace

void store_states(const PromptStates& p, Executor stream) {
  const dim3 blocks(blocks_for(p.state + p.channels, kThreads), static_cast<unsigned>(p.batch));
  launch(store_states_kernel, Grid{blocks, kThreads}, stream, p);
}

}  // namespace bitkernels::cuda
