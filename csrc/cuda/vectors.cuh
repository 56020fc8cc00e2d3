// Eight neighbouring elements of a row as fp32, in whole vectors where the row allows it.
#pragma once

#include "types.cuh"

namespace bitkernels::cuda {

constexpr int kEight = 8;

template <typename T>
constexpr int kEightAlignment = sizeof(T) < 2 ? 8 : 16;

template <typename T>
struct alignas(kEightAlignment<T>) Eight {
  T e[kEight];
};

// Whether rows of K elements from p on may be read and written in vectors.
template <typename T>
bool in_vectors(const T* p, int64_t K) {
  return K % kEight == 0 && reinterpret_cast<uintptr_t>(p) % kEightAlignment<T> == 0;
}

// Elements k .. k + 7 of a row, zero past K.
template <typename T>
__device__ Eight<T> load_eight(const T* row, int64_t k, int64_t K, bool vector) {
  if (vector) return k < K ? *reinterpret_cast<const Eight<T>*>(row + k) : Eight<T>{};
  Eight<T> eight;
#pragma unroll
  for (int e = 0; e < kEight; ++e) eight.e[e] = k + e < K ? row[k + e] : from_float<T>(0.0f);
  return eight;
}

template <typename T>
__device__ void store_eight(T* row, int64_t k, int64_t K, bool vector, const float (&v)[kEight]) {
  Eight<T> eight;
#pragma unroll
  for (int e = 0; e < kEight; ++e) eight.e[e] = from_float<T>(v[e]);
  if (vector) {
    if (k < K) *reinterpret_cast<Eight<T>*>(row + k) = eight;
    return;
  }
#pragma unroll
  for (int e = 0; e < kEight; ++e) {
    if (k + e < K) row[k + e] = eight.e[e];
  }
}

}  // namespace bitkernels::cuda
