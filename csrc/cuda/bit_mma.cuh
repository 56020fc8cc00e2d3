// Products of single bits: d[64, n] += popcount(a[64, 256] & b[n, 256]), by the four warps of a warpgroup.
//
// A and B lie in shared memory in chunks of 128 bits of k, 16 bytes each: [chunk][row], or in panels of eight chunks a
// row, [row][chunk], where chunk c of row r has the place of c ^ r % 8, so that both a row and a column of chunks lie
// in different banks. A row of packed weights is A as it is.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "wgmma.cuh"

namespace bitkernels::cuda {

constexpr int kChunkBits = 128;
constexpr int kChunkBytes = kChunkBits / 8;
constexpr int kBitMmaRows = 64;
constexpr int kBitMmaChunks = 2;
constexpr int kPanelChunks = 8;
constexpr int kPanelRowBytes = 16 * kPanelChunks;
constexpr int kPanelAlignment = 1024;

__device__ inline uint32_t panel_offset(uint32_t row, uint32_t chunk) {
  return row * kPanelRowBytes + (chunk ^ row) % kPanelChunks * 16;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// [chunk][row], `pitch` bytes from one chunk to the next.
__device__ inline uint64_t chunk_descriptor(uint32_t shared_address, int pitch) {
  constexpr uint64_t kEightRows = 8 * 16;
  return (shared_address & 0x3ffff) >> 4 | static_cast<uint64_t>(pitch >> 4) << 16 | kEightRows >> 4 << 32;
}

// Step `s` of panels.
__device__ inline uint64_t panel_descriptor(uint32_t shared_address, int s) {
  constexpr int kSteps = kPanelChunks / kBitMmaChunks;
  return wgmma_descriptor(shared_address + s / kSteps * (kBitMmaRows * kPanelRowBytes) +
                          s % kSteps * (kBitMmaChunks * kChunkBytes));
}

#endif

}  // namespace bitkernels::cuda
