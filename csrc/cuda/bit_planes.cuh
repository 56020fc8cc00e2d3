// Activations as bits: fixed-point numbers taken apart, so that bit j of 32 neighbours makes a word which meets a
// word of packed weights.
#pragma once

#include <cstdint>
#include <type_traits>

#include "int8.cuh"
#include "types.cuh"

namespace bitkernels::cuda {

constexpr int kPlanesPerLimb = 16;

// Bits of the largest activation, sign aside: 15 for bf16, which has 8 itself, and 31 for fp16 (11) and fp32 (24).
// A ternary code doubles the activation, which takes one.
template <typename F, typename T>
struct FusedFormat {
  static constexpr int kLimbs = F::kInteger || std::is_same_v<T, bf16> ? 1 : 2;
  static constexpr int kPlanes = kLimbs * kPlanesPerLimb;
  static constexpr int kCodeBits = 32 / F::kPerWord;
  static constexpr int kBits = kPlanes - kCodeBits;
  static constexpr int kPerLane = 8 / kCodeBits;  // activations that make 8 columns of bits
};

// The exponent of the step: the largest element is below 2^kBits steps, rounding included.
template <int kBits>
__device__ int step_exponent(float absmax) {
  const int exponent = static_cast<int>(__float_as_uint(absmax * (1.0f + 1.0f / 16384.0f)) >> 23) - 127;
  return max(exponent - (kBits - 1), -120);
}

// A value to fixed point; bits above those in use are arbitrary.
template <typename F, int kLimbs>
__device__ uint32_t to_fixed(float v, float per_unit) {
  if constexpr (F::kInteger) return static_cast<uint32_t>(to_int8(v, per_unit));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
  if constexpr (kLimbs == 1) return __float_as_uint(fmaf(v, per_unit, 12582912.0f));
  return static_cast<uint32_t>(__float2int_rn(v * per_unit));
}

// What to_fixed() makes of zero where there is one limb.
template <typename F>
constexpr uint32_t kZeroOf = F::kInteger ? 0 : 0x4b400000;

__device__ inline uint32_t bits_of(float v) { return __float_as_uint(v); }
__device__ inline uint32_t bits_of(bf16 v) { return __bfloat16_as_ushort(v); }
__device__ inline uint32_t bits_of(fp16 v) { return __half_as_ushort(v); }

// kCount elements of a row, zero from `end` on. They stay words until they are used: to take them apart is to wait for
// them, and loads that follow would wait as well.
template <int kCount, typename T>
struct Run {
  static constexpr int kPerRegister = 4 / sizeof(T);
  static constexpr int kRegisters = kCount / kPerRegister;
  uint32_t r[kRegisters];

  template <bool kVector>
  __device__ void load(const T* row, int k, int end) {
    if constexpr (kVector) {
      struct alignas(kRegisters < 4 ? 4 * kRegisters : 16) Vector {
        uint32_t r[kRegisters];
      };
      const Vector v = k < end ? *reinterpret_cast<const Vector*>(row + k) : Vector{};
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) r[i] = v.r[i];
    } else {
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) {
        r[i] = 0;
#pragma unroll
        for (int j = 0; j < kPerRegister; ++j) {
          const int at = k + i * kPerRegister + j;
          if (at < end) r[i] |= bits_of(row[at]) << 16 * j;
        }
      }
    }
  }

  __device__ void load_or_one(const T* row, int k, int end) {
    if (row) {
      load<true>(row, k, end);
    } else {
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) r[i] = bits_of(1.0f);
    }
  }

  __device__ float operator[](int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(r[i]);
    } else if constexpr (std::is_same_v<T, bf16>) {
      return __uint_as_float(i % 2 ? r[i / 2] & 0xffff0000u : r[i / 2] << 16);
    } else {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(r[i / 2] >> 16 * (i % 2))));
    }
  }
};

// Bits of a where the mask is set, of b elsewhere. The compiler takes two instructions for it.
template <uint32_t kMask>
__device__ uint32_t choose_bits(uint32_t a, uint32_t b) {
  uint32_t chosen;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(chosen) : "r"(a), "r"(b), "n"(kMask));
  return chosen;
}

// (a & kMask) and (b & kMask), kShift apart, in one register; and the bits that these leave behind in another.
template <int kShift, uint32_t kMask>
__device__ void exchange_bits(uint32_t& a, uint32_t& b) {
  const uint32_t first = choose_bits<kMask>(a, b << kShift);
  b = choose_bits<kMask>(a >> kShift, b);
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

// What the tensor cores counted (d as in wgmma.cuh), added up by the weight of its plane: sums over planes of limb l,
// the top one of the last limb being the sign. The four lanes of a row have two columns of eight each. Lane t gets one
// of two rows, t / 2, and one half of the tokens, t % 2.
template <int kTokens, int kLimbs, int kSums, int kKept>
__device__ void add_planes(const int (&d)[kSums], int l, int (&sum)[kKept]) {
  const int t = threadIdx.x % 4;
  int half[kTokens];
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    const int* low = d + (m * kLimbs + l) * 8;
    const int* high = low + 4;
    const int top = l == kLimbs - 1 && t == 3 ? -512 : 512;
    int row[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row[h] = (low[2 * h] + 2 * low[2 * h + 1] + 256 * high[2 * h] + top * high[2 * h + 1]) << 2 * t;
    }
    half[m] = (t < 2 ? row[0] : row[1]) + __shfl_xor_sync(0xffffffff, t < 2 ? row[1] : row[0], 2);
  }
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int other = half[(i + kKept) % kTokens];
    sum[i] = (t % 2 ? other : half[i]) + __shfl_xor_sync(0xffffffff, t % 2 ? half[i] : other, 1);
  }
}

}  // namespace bitkernels::cuda
