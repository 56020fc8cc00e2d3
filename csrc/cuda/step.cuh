// What the kernels of a decode step share.
#pragma once

#include "launch.cuh"
#include "ptx.cuh"

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

// What a kernel soon reads: `bytes` for each of `requests`, `pitch` bytes from slot to slot.
struct Ahead {
  const void* data;
  const int64_t* indices;
  int64_t slots, pitch, bytes;
  int requests;
};

// Brings the block's share as far as L2, or as much of it as it can until `enough` says so. By one thread; bytes are a
// multiple of 16.
template <typename Enough>
__device__ void prefetch_ahead(const Ahead& ahead, Enough&& enough) {
  constexpr int64_t kPiece = 16384;
  const int pieces = static_cast<int>((ahead.bytes + kPiece - 1) / kPiece);
#pragma unroll 1
  for (int i = blockIdx.x; i < pieces * ahead.requests && !enough(); i += gridDim.x) {
    const int request = i / pieces;
    const int64_t slot = slot_of(ahead.indices, ahead.slots, request), at = (i - request * pieces) * kPiece;
    if (slot < 0) continue;
    prefetch_to_l2(static_cast<const char*>(ahead.data) + slot * ahead.pitch + at,
                   static_cast<uint32_t>(min(ahead.bytes - at, kPiece)));
  }
}

__device__ inline void prefetch_ahead(const Ahead& ahead) {
  prefetch_ahead(ahead, [] { return false; });
}

// Of a packed projection that is added to the residual after an RMSNorm.
struct NormedSum {
  const float* norm;  // [K]
  float eps;
  float* residual;  // [tokens, columns]
};

}  // namespace bitkernels::cuda
