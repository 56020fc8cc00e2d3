// What kernels that make a step of the state share: rows by vectors, step sizes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "mixer_kernels.h"
#include "ptx.cuh"
#include "types.cuh"

namespace bitkernels::cuda {

// Division of what is below 2^31 by a number known at launch.
struct Divisor {
  uint32_t by, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : by(static_cast<uint32_t>(divisor)), shift(0) {
    while (int64_t(1) << shift < divisor) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t(1) << shift) - by) << 32) / by + 1);
  }
  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

// kCount neighbours of a row, as words.
template <typename T, int kCount>
struct Elements {
  static constexpr int kWords = kCount * sizeof(T) / 4;
  static_assert(kWords == 2 || kWords % 4 == 0);
  uint32_t words[kWords];

  // From `from` on, of which `left` exist; zero beyond. kVector: all or none, aligned.
  template <bool kVector>
  __device__ void load(const T* from, int left) {
    if constexpr (!kVector) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) set(i, i < left ? from[i] : from_float<T>(0.0f));
    } else if constexpr (kWords == 2) {
      const uint2 v = left > 0 ? *reinterpret_cast<const uint2*>(from) : uint2{};
      words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = left > 0 ? reinterpret_cast<const uint4*>(from)[i / 4] : uint4{};
        words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
      }
    }
  }

  template <bool kVector>
  __device__ void store(T* to, int left) const {
    if constexpr (!kVector) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i < left) to[i] = at(i);
      }
    } else {
      static_assert(kWords == 4);
      if (left > 0) store_vector(to, words);
    }
  }

  __device__ T at(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      const auto half = static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2));
      if constexpr (std::is_same_v<T, bf16>) return __ushort_as_bfloat16(half);
      if constexpr (std::is_same_v<T, fp16>) return __ushort_as_half(half);
    }
  }
  __device__ float operator[](int i) const {
    // In one instruction, where it was two for the upper half.
    if constexpr (std::is_same_v<T, bf16>)
      return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    return to_float(at(i));
  }

  __device__ void set(int i, T v) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(v);
    } else {
      uint32_t bits;
      if constexpr (std::is_same_v<T, bf16>) bits = __bfloat16_as_ushort(v);
      if constexpr (std::is_same_v<T, fp16>) bits = __half_as_ushort(v);
      words[i / 2] = i % 2 ? (words[i / 2] & 0xffffu) | bits << 16 : bits;
    }
  }
};

__device__ inline float softplus(float v) { return fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v))); }

__device__ inline float step_size(const SsdStep& p, float dt) {
  if (p.dt_softplus) dt = softplus(dt);
  const float low = static_cast<float>(p.dt_min), high = static_cast<float>(p.dt_max);
  return dt < low ? low : dt > high ? high : dt;  // NaN stays
}

template <typename T>
constexpr DType kTypeOf = std::is_same_v<T, float>  ? DType::kFloat32
                          : std::is_same_v<T, fp16> ? DType::kFloat16
                                                    : DType::kBFloat16;

// What depends on the value happens after this, and what makes it before.
__device__ inline void settle(uint32_t& v) { asm volatile("" : "+r"(v)); }
template <typename T>
__device__ void settle(T*& p) {
  asm volatile("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
}

}  // namespace bitkernels::cuda
