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

// Words [first, first + 4) of a row, zero past its end.
__device__ inline uint4 load_words(const Weights& w, const uint32_t* row, int64_t first) {
  if (w.vector) {
    return first < w.words ? load_streaming(reinterpret_cast<const uint4*>(row + first)) : uint4{};
  }
  uint4 v{};
  if (first < w.words) v.x = __ldg(row + first);
  if (first + 1 < w.words) v.y = __ldg(row + first + 1);
  if (first + 2 < w.words) v.z = __ldg(row + first + 2);
  if (first + 3 < w.words) v.w = __ldg(row + first + 3);
  return v;
}

// j is a constant once loops are unrolled.
__device__ inline uint32_t component(const uint4& v, int j) { return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w; }

}  // namespace bitkernels::cuda
