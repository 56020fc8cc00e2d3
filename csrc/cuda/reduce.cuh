// Sums and maxima over a block or lanes of a warp, in a fixed order: the same bits on every run.
#pragma once

#include <cuda_runtime.h>

namespace bitkernels::cuda {

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <typename T, typename Op>
__device__ T warp_reduce(T v, Op op) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = op(v, __shfl_xor_sync(0xffffffff, v, offset));
  return v;
}

// Every thread gets the result. `scratch` holds one T per warp and may be reused after the call.
template <typename T, typename Op>
__device__ T block_reduce(T v, Op op, T* scratch) {
  const int warps = blockDim.x / 32;
  v = warp_reduce(v, op);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = scratch[0];
  for (int i = 1; i < warps; ++i) v = op(v, scratch[i]);
  __syncthreads();
  return v;
}

// Of two values: the first goes to lanes that have bit `bit` clear, the second to the others, each summed over the two.
template <typename T>
__device__ T add_halves(T first, T second, int bit) {
  const bool upper = threadIdx.x & bit;
  const T other = __shfl_xor_sync(0xffffffff, upper ? first : second, bit);
  return (upper ? second : first) + other;
}

// Over the lanes that differ in bits `from` to `below`, powers of two, the latter excluded; each gets the sum.
template <typename T>
__device__ T add_lanes(T v, int from, int below) {
#pragma unroll
  for (int bit = from; bit < below; bit *= 2) v += __shfl_xor_sync(0xffffffff, v, bit);
  return v;
}

}  // namespace bitkernels::cuda
