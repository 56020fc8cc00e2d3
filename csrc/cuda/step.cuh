// What the kernels of a decode step share.
#pragma once

#include "launch.cuh"

namespace bitkernels::cuda {

inline Grid step_grid(dim3 blocks, int threads) {
  Grid grid{blocks, threads, 0, true};
  grid.beside_previous = true;
  return grid;
}

// The slot of a request in a pool of states, negative for none: indices cannot be checked without waiting for them.
__device__ inline int64_t slot_of(const int64_t* indices, int64_t slots, int64_t request) {
  const int64_t slot = indices ? indices[request] : request;
  return slot < slots ? slot : -1;
}

__device__ inline float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

}  // namespace bitkernels::cuda
