// Stochastic rounding of fp32 to 16 bits, with random bits that depend on nothing but their key and counter.
#pragma once

#include <type_traits>

#include "bit_planes.cuh"
#include "types.cuh"

namespace bitkernels::cuda {

// The bits of eight neighbours in each of kRows rows, as reference.state_random_bits has them: one draw of
// Philox4x32-10 a row. Its rounds wait for each other, so all rows go through them together.
template <int kRows>
class RandomBits {
 public:
  __device__ void draw(int64_t seed, int64_t position, uint32_t first_row, uint32_t rows_apart, uint32_t group) {
    constexpr int kRounds = 10;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      words_[r][0] = group, words_[r][1] = first_row + r * rows_apart;
      words_[r][2] = static_cast<uint32_t>(position), words_[r][3] = static_cast<uint32_t>(position >> 32);
    }
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
#pragma unroll
      for (uint32_t (&w)[4] : words_) {
        const uint64_t first = uint64_t(w[0]) * 0xD2511F53u, third = uint64_t(w[2]) * 0xCD9E8D57u;
        w[0] = static_cast<uint32_t>(third >> 32) ^ w[1] ^ low;
        w[1] = static_cast<uint32_t>(third);
        w[2] = static_cast<uint32_t>(first >> 32) ^ w[3] ^ high;
        w[3] = static_cast<uint32_t>(first);
      }
      low += 0x9E3779B9u, high += 0xBB67AE85u;
    }
  }

  // Of neighbours 2 i and 2 i + 1, the first in the lower half. Both are constants once loops are unrolled.
  __device__ uint32_t pair(int row, int i) const { return words_[row][i]; }

  // Of a row's neighbours, those that are infinite or NaN lose their bits.
  __device__ void clear_unless_finite(int row, const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool finite = (__float_as_uint(v[i]) & 0x7f800000u) != 0x7f800000u;
      words_[row][i / 2] &= finite ? 0xffffffffu : i % 2 ? 0xffffu : 0xffff0000u;
    }
  }

 private:
  uint32_t words_[kRows][4];
};

// Away from zero with the probability of the 13 bits that are cut off.
__device__ inline fp16 round_to_half(float v, uint32_t bits) {
  const uint32_t raw = __float_as_uint(v);
  const uint32_t magnitude = raw & 0x7fffffffu;
  if (magnitude >= 0x47800000u) return from_float<fp16>(v);
  const uint32_t cut = bits >> 3;
  uint32_t half;
  if (magnitude < 0x38800000u) {
    // Subnormal halves are multiples of 2^-24: 13 bits beyond that as an integer, by its truncation.
    half = (static_cast<uint32_t>(fabsf(v) * 137438953472.0f) + cut) >> 13;
  } else {
    half = min((magnitude + cut - 0x38000000u) >> 13, 0x7c00u);
  }
  return __ushort_as_half(static_cast<unsigned short>(half | (raw & 0x80000000u) >> 16));
}

// Two neighbours as a word, by a word of bits. bf16 has all 16 bits added that are cut off: to infinity and NaN none
// may be (a NaN that arithmetic makes has bits in both halves).
template <typename S>
__device__ uint32_t round_stochastically(float first, float second, uint32_t bits) {
  if constexpr (std::is_same_v<S, bf16>) {
    return __byte_perm(__float_as_uint(first) + (bits & 0xffffu), __float_as_uint(second) + (bits >> 16), 0x7632);
  } else {
    return bits_of(round_to_half(first, bits & 0xffffu)) | bits_of(round_to_half(second, bits >> 16)) << 16;
  }
}

}  // namespace bitkernels::cuda
