// Of stack_tokens.cuh: products of +1 and -1 in bf16, and what passes from block to block.
#pragma once

#include "ptx.cuh"
#include "stack_exchange.cuh"
#include "types.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace bitkernels::cuda {

// c[16, 8] += a[16, 16] b[16, 8] of bf16, see mma() in ptx.cuh.
__device__ inline void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Bits i and i + 16 of a word, as +1 or -1.
__device__ inline uint32_t sign_pair(uint32_t word, int i) {
  uint32_t pair;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(pair) : "r"(word << (15 - i)), "n"(0x80008000), "r"(0xbf80bf80));
  return pair;
}

// A unit of K of kTiles tiles of 16 rows. w: the lane's words of rows g and g + 8; x: its 32 activations.
template <int kTiles>
__device__ void multiply_unit(float (&sums)[kTiles][4], const uint32_t (&w)[kTiles][2], const uint4 (&x)[4]) {
  const uint32_t low[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
  const uint32_t high[8] = {x[2].x, x[2].y, x[2].z, x[2].w, x[3].x, x[3].y, x[3].z, x[3].w};
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const uint32_t b0 = __byte_perm(low[s], high[s], 0x5410), b1 = __byte_perm(low[s], high[s], 0x7632);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      mma_bf16(sums[m], sign_pair(w[m][0], 2 * s), sign_pair(w[m][1], 2 * s), sign_pair(w[m][0], 2 * s + 1),
               sign_pair(w[m][1], 2 * s + 1), b0, b1);
    }
  }
}

__device__ inline uint32_t load_weights(const uint32_t* p, uint64_t policy) {
  uint32_t v;
  asm volatile("ld.global.nc.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "l"(policy));
  return v;
}

// All have been asked for before the first is looked at.
template <int kCount>
__device__ bool all_written(const uint4 (&v)[kCount]) {
  bool all = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) all = all & written(v[i].x) & written(v[i].y) & written(v[i].z) & written(v[i].w);
  return all;
}

__device__ inline void store_exchanged(void* p, uint32_t x, uint32_t y) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x), "r"(y) : "memory");
}

__device__ inline uint32_t pair_of(float first, float second) {
  return bits_of(from_float<bf16>(first)) | bits_of(from_float<bf16>(second)) << 16;
}

// A lane has a row's values of two tokens, its neighbour (lane ^ 1) those of the other row of a pair. Leaves the pair
// of token 2 q in the even lane and that of 2 q + 1 in the odd one. By a whole warp.
__device__ inline uint32_t pair_of_token(float first, float second) {
  const bool odd = threadIdx.x & 1;
  const float other = __shfl_xor_sync(0xffffffff, odd ? first : second, 1);
  return odd ? pair_of(other, second) : pair_of(first, other);
}

}  // namespace bitkernels::cuda

#endif
