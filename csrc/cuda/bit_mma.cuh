// Products of single bits: d[64, n] += popcount(a[64, 256] & b[n, 256]), by the four warps of a warpgroup.
//
// A and B lie in shared memory in chunks of 128 bits of k, 16 bytes each: [chunk][row], or in panels of eight chunks a
// row, [row][chunk], where chunk c of row r has the place of c ^ r % 8, so that both a row and a column of chunks lie
// in different banks. A row of packed weights is A as it is.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitkernels::cuda {

constexpr int kBitMmaRows = 64;
constexpr int kBitMmaChunks = 2;
constexpr int kPanelChunks = 8;
constexpr int kPanelRowBytes = 16 * kPanelChunks;
constexpr int kPanelAlignment = 1024;

__device__ inline uint32_t panel_offset(uint32_t row, uint32_t chunk) {
  return row * kPanelRowBytes + (chunk ^ row) % kPanelChunks * 16;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline uint64_t operand_at(const void* shared) {
  return (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) & 0x3ffff) >> 4;
}

// [chunk][row], `pitch` bytes from one chunk to the next.
__device__ inline uint64_t chunk_operand(const void* shared, int pitch) {
  constexpr uint64_t kEightRows = 8 * 16;
  return operand_at(shared) | static_cast<uint64_t>(pitch >> 4) << 16 | kEightRows >> 4 << 32;
}

// Step `s` of the panels at `shared`.
__device__ inline uint64_t panel_operand(const uint8_t* shared, int s) {
  constexpr uint64_t kEightRows = 8 * kPanelRowBytes;
  constexpr uint64_t kSwizzled = uint64_t(1) << 62;
  constexpr int kSteps = kPanelChunks / kBitMmaChunks;
  const uint8_t* from = shared + s / kSteps * (kBitMmaRows * kPanelRowBytes) + s % kSteps * (kBitMmaChunks * 16);
  return operand_at(from) | uint64_t(1) << 16 | kEightRows >> 4 << 32 | kSwizzled;
}

// A lane has rows g and g + 8 of its warp's 16, g = lane / 4, and of every eight columns 2t and 2t + 1, t = lane % 4:
// c[column / 8][row / 8 * 2 + column % 2].
__device__ inline void bit_mma(int (&c)[2][4], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k256.s32.b1.b1.and.popc {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1;"
               : "+r"(c[0][0]), "+r"(c[0][1]), "+r"(c[0][2]), "+r"(c[0][3]), "+r"(c[1][0]), "+r"(c[1][1]),
                 "+r"(c[1][2]), "+r"(c[1][3])
               : "l"(a), "l"(b));
}

__device__ inline void bit_mma(int (&c)[8][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k256.s32.b1.b1.and.popc {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
      "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, "
      "1;"
      : "+r"(c[0][0]), "+r"(c[0][1]), "+r"(c[0][2]), "+r"(c[0][3]), "+r"(c[1][0]), "+r"(c[1][1]), "+r"(c[1][2]),
        "+r"(c[1][3]), "+r"(c[2][0]), "+r"(c[2][1]), "+r"(c[2][2]), "+r"(c[2][3]), "+r"(c[3][0]), "+r"(c[3][1]),
        "+r"(c[3][2]), "+r"(c[3][3]), "+r"(c[4][0]), "+r"(c[4][1]), "+r"(c[4][2]), "+r"(c[4][3]), "+r"(c[5][0]),
        "+r"(c[5][1]), "+r"(c[5][2]), "+r"(c[5][3]), "+r"(c[6][0]), "+r"(c[6][1]), "+r"(c[6][2]), "+r"(c[6][3]),
        "+r"(c[7][0]), "+r"(c[7][1]), "+r"(c[7][2]), "+r"(c[7][3])
      : "l"(a), "l"(b));
}

// Around a batch of products; and until the results of all batches are there.
__device__ inline void begin_bit_mma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_bit_mma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ inline void wait_for_bit_mma() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#endif

}  // namespace bitkernels::cuda
