// Per-token int8 as kernels.h states it: each step is one correctly rounded fp32 operation, so that the
// result is the same to the bit wherever it is computed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitkernels::cuda {

__device__ inline float int8_scale(float absmax) { return __fdiv_rn(127.0f, fmaxf(absmax, 1e-5f)); }

__device__ inline int8_t to_int8(float v, float scale) {
  const float q = rintf(__fmul_rn(v, scale));
  return static_cast<int8_t>(fminf(fmaxf(q, -128.0f), 127.0f));
}

}  // namespace bitkernels::cuda
