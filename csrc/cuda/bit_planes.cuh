// Activations as bits: fixed-point numbers taken apart, so that bit j of 32 neighbours makes a word which meets a
// word of packed weights.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitkernels::cuda {

constexpr int kPlanesPerLimb = 16;

// (a & kMask) and (b & kMask), kShift apart, in one register; and the bits that these leave behind in another.
template <int kShift, uint32_t kMask>
__device__ void exchange_bits(uint32_t& a, uint32_t& b) {
  const uint32_t first = (a & kMask) | ((b << kShift) & ~kMask);
  b = ((a >> kShift) & kMask) | (b & ~kMask);
  a = first;
}

// Register i of lane j of four becomes register j of lane i.
__device__ inline void transpose_quad(uint32_t (&v)[4]) {
  const bool odd = threadIdx.x & 1;
  const bool upper = threadIdx.x & 2;
#pragma unroll
  for (int r = 0; r < 4; r += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffff, odd ? v[r] : v[r + 1], 1);
    v[r] = odd ? other : v[r];
    v[r + 1] = odd ? v[r + 1] : other;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t other = __shfl_xor_sync(0xffffffff, upper ? v[r] : v[r + 2], 2);
    v[r] = upper ? other : v[r];
    v[r + 2] = upper ? v[r + 2] : other;
  }
}

// A lane has the lower (or upper) halves of eight neighbours, four lanes those of a word. It leaves with the words of
// planes t, t + 4, t + 8 and t + 12, where t = lane % 4. Below, e is a neighbour and b a bit of it; each step
// exchanges a bit of the register's index, of the lane's or of the position with another.
__device__ inline void to_planes(const uint32_t (&e)[8], bool upper, uint32_t (&plane)[4]) {
  uint32_t v[4];  // v[e1 e0] at position e2 b3 b2 b1 b0
#pragma unroll
  for (int r = 0; r < 4; ++r) v[r] = __byte_perm(e[r], e[r + 4], upper ? 0x7632 : 0x5410);
  exchange_bits<1, 0x55555555>(v[0], v[1]);
  exchange_bits<1, 0x55555555>(v[2], v[3]);
  exchange_bits<2, 0x33333333>(v[0], v[2]);
  exchange_bits<2, 0x33333333>(v[1], v[3]);
  transpose_quad(v);  // v[e4 e3] of lane b1 b0 at position e2 b3 b2 e1 e0
  const uint32_t low[2] = {__byte_perm(v[0], v[1], 0x5140), __byte_perm(v[2], v[3], 0x5140)};
  const uint32_t high[2] = {__byte_perm(v[0], v[1], 0x7362), __byte_perm(v[2], v[3], 0x7362)};
  plane[0] = __byte_perm(low[0], low[1], 0x5410);  // plane[b3 e2] at position e4 e3 b2 e1 e0
  plane[2] = __byte_perm(low[0], low[1], 0x7632);
  plane[1] = __byte_perm(high[0], high[1], 0x5410);
  plane[3] = __byte_perm(high[0], high[1], 0x7632);
  exchange_bits<4, 0x0f0f0f0f>(plane[0], plane[1]);
  exchange_bits<4, 0x0f0f0f0f>(plane[2], plane[3]);
}

}  // namespace bitkernels::cuda
