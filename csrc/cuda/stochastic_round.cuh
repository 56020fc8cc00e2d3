// Stochastic rounding of fp32 to 16 bits, with random bits that depend on nothing but their key and counter.
#pragma once

#include <type_traits>

#include "bit_planes.cuh"
#include "types.cuh"

namespace bitkernels::cuda {

constexpr int kRandomRounds = 10;

// Of each round, made of the seed once.
struct RandomKeys {
  uint32_t low[kRandomRounds], high[kRandomRounds];

  __device__ explicit RandomKeys(int64_t seed) {
#pragma unroll
    for (int i = 0; i < kRandomRounds; ++i) {
      low[i] = static_cast<uint32_t>(seed) + i * 0x9E3779B9u;
      high[i] = static_cast<uint32_t>(seed >> 32) + i * 0xBB67AE85u;
    }
  }
};

// The bits of eight neighbours of a row, as reference.state_random_bits has them: one draw of Philox4x32-10.
class RandomBits {
 public:
  __device__ RandomBits(const RandomKeys& keys, int64_t position, int64_t row, int64_t group)
      : words_{static_cast<uint32_t>(group), static_cast<uint32_t>(row), static_cast<uint32_t>(position),
               static_cast<uint32_t>(position >> 32)} {
#pragma unroll
    for (int i = 0; i < kRandomRounds; ++i) {
      const uint64_t first = uint64_t(words_[0]) * 0xD2511F53u, third = uint64_t(words_[2]) * 0xCD9E8D57u;
      words_[0] = static_cast<uint32_t>(third >> 32) ^ words_[1] ^ keys.low[i];
      words_[1] = static_cast<uint32_t>(third);
      words_[2] = static_cast<uint32_t>(first >> 32) ^ words_[3] ^ keys.high[i];
      words_[3] = static_cast<uint32_t>(first);
    }
  }

  // Of neighbours 2 i and 2 i + 1, the first in the lower half. i is a constant once loops are unrolled.
  __device__ uint32_t pair(int i) const { return words_[i]; }

 private:
  uint32_t words_[4];
};

template <typename S>
__device__ S round_stochastically(float v, uint32_t bits);

// Away from zero with the probability of the 16 bits that are cut off; infinity and NaN as they are (a NaN that
// arithmetic makes has bits in both halves).
template <>
__device__ inline bf16 round_stochastically<bf16>(float v, uint32_t bits) {
  const uint32_t raw = __float_as_uint(v);
  const uint32_t added = (raw & 0x7f800000u) == 0x7f800000u ? 0u : bits;
  return __ushort_as_bfloat16(static_cast<unsigned short>((raw + added) >> 16));
}

template <>
__device__ inline fp16 round_stochastically<fp16>(float v, uint32_t bits) {
  const uint32_t raw = __float_as_uint(v);
  const uint32_t magnitude = raw & 0x7fffffffu;
  if (magnitude >= 0x47800000u) return from_float<fp16>(v);
  const uint32_t cut = bits >> 3;  // 13 bits are cut off
  uint32_t half;
  if (magnitude < 0x38800000u) {
    // Subnormal halves are multiples of 2^-24: 13 bits beyond that as an integer, by its truncation.
    half = (static_cast<uint32_t>(fabsf(v) * 137438953472.0f) + cut) >> 13;
  } else {
    half = min((magnitude + cut - 0x38000000u) >> 13, 0x7c00u);
  }
  return __ushort_as_half(static_cast<unsigned short>(half | (raw & 0x80000000u) >> 16));
}

// Two neighbours that are neither infinite nor NaN, as a word, by a word of bits.
template <typename S>
__device__ uint32_t round_finite(float first, float second, uint32_t bits) {
  if constexpr (std::is_same_v<S, bf16>) {
    return __byte_perm(__float_as_uint(first) + (bits & 0xffffu), __float_as_uint(second) + (bits >> 16), 0x7632);
  } else {
    return bits_of(round_stochastically<S>(first, bits & 0xffffu)) |
           bits_of(round_stochastically<S>(second, bits >> 16)) << 16;
  }
}

}  // namespace bitkernels::cuda
