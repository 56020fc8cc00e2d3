// Element types: run-time dispatch, and conversion to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels.h"

namespace bitkernels::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bf16 v) { return __bfloat162float(v); }
__device__ inline float to_float(fp16 v) { return __half2float(v); }
__device__ inline float to_float(int8_t v) { return static_cast<float>(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline bf16 from_float<bf16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline fp16 from_float<fp16>(float v) {
  return __float2half_rn(v);
}

template <>
__device__ inline int8_t from_float<int8_t>(float v) {
  return static_cast<int8_t>(v);
}

// One element of an activation tensor whose type is known at run time only. The branch is uniform and
// stays out of inner loops, which read prepared activations; it saves one instance of a kernel per type.
__device__ inline float load(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16: return to_float(static_cast<const bf16*>(p)[i]);
    case DType::kFloat16: return to_float(static_cast<const fp16*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}

__device__ inline void store(void* p, DType dtype, int64_t i, float v) {
  switch (dtype) {
    case DType::kBFloat16: static_cast<bf16*>(p)[i] = from_float<bf16>(v); break;
    case DType::kFloat16: static_cast<fp16*>(p)[i] = from_float<fp16>(v); break;
    default: static_cast<float*>(p)[i] = v;
  }
}

// An element that was loaded as its bits, since to convert it is to wait for it. Selects, where branches became a jump.
__device__ inline float from_bits(DType dtype, uint32_t bits) {
  const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return dtype == DType::kFloat32   ? __uint_as_float(bits)
         : dtype == DType::kFloat16 ? half
                                    : __uint_as_float(bits << 16);
}

__device__ inline uint32_t to_bits(DType dtype, float v) {
  const uint32_t half = __half_as_ushort(__float2half_rn(v)), other = __bfloat16_as_ushort(__float2bfloat16_rn(v));
  return dtype == DType::kFloat32 ? __float_as_uint(v) : dtype == DType::kFloat16 ? half : other;
}

// Calls f(T{}) for the type of an activation.
template <typename F>
void dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(bf16{});
    case DType::kFloat16: return f(fp16{});
    default: return f(float{});
  }
}

// The same where int8 is a possibility.
template <typename F>
void dispatch(DType dtype, F&& f) {
  if (dtype == DType::kInt8) return f(int8_t{});
  dispatch_float(dtype, f);
}

}  // namespace bitkernels::cuda
