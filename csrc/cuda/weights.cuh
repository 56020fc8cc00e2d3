// The packed matrix as kernels read it.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace bitkernels::cuda {

constexpr int kMmaRows = 16;

struct Weights {
  const uint32_t* packed;  // [rows, words]
  int64_t rows, words;
  bool vector;  // rows are whole, aligned 16-byte vectors
};

inline Weights weights(const uint32_t* packed, int64_t rows, int64_t words) {
  return {packed, rows, words, words % 4 == 0 && reinterpret_cast<uintptr_t>(packed) % 16 == 0};
}

// Four words of a row that has `left` more; zero past its end.
__device__ inline uint4 load_words(const Weights& w, const uint32_t* from, int64_t left) {
  if (w.vector) return left > 0 ? load_streaming(reinterpret_cast<const uint4*>(from)) : uint4{};
  uint4 v{};
  if (left > 0) v.x = __ldg(from);
  if (left > 1) v.y = __ldg(from + 1);
  if (left > 2) v.z = __ldg(from + 2);
  if (left > 3) v.w = __ldg(from + 3);
  return v;
}

// j is a constant once loops are unrolled.
__device__ inline uint32_t component(const uint4& v, int j) { return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w; }

}  // namespace bitkernels::cuda
