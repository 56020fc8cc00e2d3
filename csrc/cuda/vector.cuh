// Four neighbouring elements, loaded and stored at once.
#pragma once

#include <type_traits>

#include "types.cuh"

namespace bitkernels::cuda {

constexpr int kVector = 4;

// As they lie in memory: to convert them is to wait for them.
template <typename T>
using Raw = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

template <typename T>
__device__ Raw<T> load_raw(const T* p) {
  return *reinterpret_cast<const Raw<T>*>(p);
}

template <typename T>
__device__ float4 widen(const Raw<T>& raw) {
  const T* p = reinterpret_cast<const T*>(&raw);
  return {to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}

template <typename T>
__device__ void store_vector(T* p, const float4& v) {
  Raw<T> raw;
  T* out = reinterpret_cast<T*>(&raw);
  out[0] = from_float<T>(v.x), out[1] = from_float<T>(v.y), out[2] = from_float<T>(v.z), out[3] = from_float<T>(v.w);
  *reinterpret_cast<Raw<T>*>(p) = raw;
}

__device__ inline float4 load_vector(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16: return widen<bf16>(load_raw(static_cast<const bf16*>(p) + i));
    case DType::kFloat16: return widen<fp16>(load_raw(static_cast<const fp16*>(p) + i));
    default: return widen<float>(load_raw(static_cast<const float*>(p) + i));
  }
}

__device__ inline void store_vector(void* p, DType dtype, int64_t i, const float4& v) {
  switch (dtype) {
    case DType::kBFloat16: return store_vector(static_cast<bf16*>(p) + i, v);
    case DType::kFloat16: return store_vector(static_cast<fp16*>(p) + i, v);
    default: return store_vector(static_cast<float*>(p) + i, v);
  }
}

// Whether every element of index divisible by four may be loaded with the three after it.
inline bool loads_vectors(const void* p, DType dtype) {
  return reinterpret_cast<uintptr_t>(p) % (dtype == DType::kFloat32 ? 16 : 8) == 0;
}

}  // namespace bitkernels::cuda
