// How packed weights become the register operand of wgmma: 64 rows times the weights of one step of K.
//
// A step is 64 bytes of activations a token: 32 elements of 16 bits or 64 of 8, two products. A lane of a quad
// wants neighbouring columns of a row, so the four lanes read the same words and each turns its own bits to
// where PRMT finds them.
#pragma once

#include <type_traits>

#include "int8.cuh"
#include "types.cuh"
#include "wgmma.cuh"

namespace bitkernels::cuda {

__device__ inline uint32_t pack_pair(bf16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ inline uint32_t pack_pair(fp16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Both values of a weight, for two neighbouring columns: chosen = low ^ (mask & difference).
struct Values {
  uint32_t low, difference;
};

template <typename T>
__device__ Values values_of(float alpha0, float beta0, float alpha1, float beta1) {
  const uint32_t low = pack_pair(T(), beta0 - alpha0, beta1 - alpha1);
  return {low, low ^ pack_pair(T(), beta0 + alpha0, beta1 + alpha1)};
}

__device__ inline uint32_t choose(const Values& c, uint32_t mask) { return c.low ^ (mask & c.difference); }

// The sign bit of byte i of two registers, as masks for the two halves of a register. (__byte_perm would drop the
// bit of the selector that asks for signs.)
__device__ inline uint32_t sign_masks(uint32_t first, uint32_t second, int i) {
  uint32_t masks;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(masks) : "r"(first), "r"(second), "r"(0xcc88 + 0x1111 * i));
  return masks;
}

// Two products of 16 columns of 16 bits, or 32 of 8.
template <typename T>
struct DenseOperand {
  using Left = uint32_t[2][4];

  template <int n, typename Accumulator>
  static __device__ __forceinline__ void multiply(Accumulator (&sums)[n], const Left& a, uint64_t b, int accumulate,
                                                  int) {
    constexpr int kBytes = 32;  // of a token, in a product
    wgmma(T(), sums, a[0], b, accumulate);
    wgmma(T(), sums, a[1], b + kBytes / 16, 1);
  }
};

// W~ = alpha * S + beta rounded to T, as the dense layer would hold it.
template <typename T_>
struct SignOperand : DenseOperand<T_> {
  using T = T_;
  using Accumulator = float;
  static constexpr int kPerWord = 32;
  static constexpr int kWords = 1;  // of a row in a step

  // Takes bit 2t of each byte to its top. A product, because shifts are left to the pipe that makes everything else
  // here.
  uint32_t raise;
  __device__ explicit SignOperand(int t) : raise(128u >> 2 * t) {}

  // values(i, h): both values of the columns 2t + 8 i and the next, of row g + 8 h.
  template <typename ValuesOf>
  __device__ void decode(const uint32_t (&upper)[1], const uint32_t (&lower)[1], const ValuesOf& values,
                         uint32_t (&a)[2][4]) const {
    const uint32_t u[2] = {upper[0] * raise, upper[0] * (raise / 2)};
    const uint32_t v[2] = {lower[0] * raise, lower[0] * (raise / 2)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i / 2][i % 2 * 2] = choose(values(i, 0), sign_masks(u[0], u[1], i));
      a[i / 2][i % 2 * 2 + 1] = choose(values(i, 1), sign_masks(v[0], v[1], i));
    }
  }
};

// -1, 0 and 1: 2^m + code, as a code in the low bits of the mantissa makes it, less 2^m + 1.
template <typename T_>
struct TernaryOperand : DenseOperand<T_> {
  using T = T_;
  using Accumulator = float;
  static constexpr int kPerWord = 16;
  static constexpr int kWords = 2;

  int first_bit;
  __device__ explicit TernaryOperand(int t) : first_bit(4 * t) {}

  static __device__ uint32_t to_weights(uint32_t codes) {
    constexpr uint32_t kCodes = 0x00030003;
    if constexpr (std::is_same_v<T, bf16>) {
      const uint32_t raised = (codes & kCodes) | 0x43004300;  // 128 + code
      const __nv_bfloat162 v = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&raised), __float2bfloat162_rn(129.0f));
      return *reinterpret_cast<const uint32_t*>(&v);
    } else {
      const uint32_t raised = (codes & kCodes) | 0x64006400;  // 1024 + code
      const __half2 v = __hsub2(*reinterpret_cast<const __half2*>(&raised), __float2half2_rn(1025.0f));
      return *reinterpret_cast<const uint32_t*>(&v);
    }
  }
  __device__ void decode(const uint32_t (&upper)[2], const uint32_t (&lower)[2], uint32_t (&a)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t word = h ? lower[i] : upper[i];
        const uint32_t even = word >> first_bit;
        const uint32_t odd = word >> (first_bit + 2);
        a[i][h] = to_weights(__byte_perm(even, odd, 0x5410));
        a[i][h + 2] = to_weights(__byte_perm(even, odd, 0x7632));
      }
    }
  }
};

// Codes 0, 1 and 2 as bytes. The activations of each 16 columns lie so that byte b of lane t is column 4 b + t.
struct TernaryInt8Operand : DenseOperand<int8_t> {
  using T = int8_t;
  using Accumulator = int;
  static constexpr int kPerWord = 16;
  static constexpr int kWords = 4;

  int first_bit;
  __device__ explicit TernaryInt8Operand(int t) : first_bit(2 * t) {}

  __device__ void decode(const uint32_t (&upper)[4], const uint32_t (&lower)[4], uint32_t (&a)[2][4]) const {
    constexpr uint32_t kCodes = 0x03030303;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i / 2][i % 2 * 2] = upper[i] >> first_bit & kCodes;
      a[i / 2][i % 2 * 2 + 1] = lower[i] >> first_bit & kCodes;
    }
  }
};

// S of pairs of columns: s1 x1 + s2 x2 is s1 times the sum of both or their difference, so that of activations that
// were made into sums and differences (pair_rows.cuh) the tensor cores need every other one, and take half the time for
// it.
struct PairOperand {
  using T = fp16;
  using Accumulator = float;
  static constexpr int kPerWord = 32;
  static constexpr int kWords = 1;
  // Of a step, 32 columns; the lanes of a quad share what is kept of two.
  struct Left {
    uint32_t signs[4];
    uint32_t kept;
  };

  // The compiler would make these anew at every use, and an instruction has room for one constant, not two; what came
  // through a shuffle it keeps.
  const uint32_t lane, minus_one, second_two, raise, raise_less, low_shift, high_shift;
  __device__ explicit PairOperand(int t)
      : lane(__shfl_sync(0xffffffff, t, threadIdx.x % 32)),  // of the quad
        minus_one(0xbc00bc00 ^ lane / 4),
        second_two(0x88888888 ^ lane / 4),
        raise(__shfl_sync(0xffffffff, 1u << (15 - 4 * t), threadIdx.x % 32)),
        raise_less(__shfl_sync(0xffffffff, 1u << (13 - 4 * t), threadIdx.x % 32)),
        low_shift(__shfl_sync(0xffffffff, t % 2 * 2, threadIdx.x % 32)),
        high_shift(__shfl_sync(0xffffffff, 2 - t % 2 * 2, threadIdx.x % 32)) {}

  __device__ void decode(const uint32_t (&upper)[2][1], const uint32_t (&lower)[2][1], Left (&a)[2]) const {
    // Bits 4t and 4t + 16 of a word to the tops of two halves, or 4t + 2 and 4t + 18.
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = i % 2 ? lower[i / 4][0] : upper[i / 4][0];
      a[i / 4].signs[i % 4] = (word * (i % 4 / 2 ? raise_less : raise) & 0x80008000) ^ minus_one;
    }
    // Whether the signs of columns 2i and 2i + 1 differ, in bit 2i: then their difference is kept, not their sum.
    const int own = lane < 2 ? 0 : 1;
    const uint32_t first = own ? upper[1][0] : upper[0][0], second = own ? lower[1][0] : lower[0][0];
    const uint32_t low = __byte_perm(first, second, 0x5410), high = __byte_perm(first, second, 0x7632);
    const uint32_t low_differs = low ^ low >> 1, high_differs = high ^ high >> 1;
    a[0].kept = (low_differs >> low_shift & 0x11111111) | ((high_differs << high_shift & 0x44444444) | second_two);
    a[1].kept = a[0].kept;
  }

  template <int n>
  static __device__ __forceinline__ void multiply(float (&sums)[n], const Left& a, uint64_t b, int accumulate,
                                                  int step) {
    step == 0 ? wgmma_pairs<0>(sums, a.signs, a.kept, b, accumulate)
              : wgmma_pairs<1>(sums, a.signs, a.kept, b, accumulate);
  }
};

}  // namespace bitkernels::cuda
