// Stochastic rounding of fp32 to 16 bits, with random bits that depend on nothing but their key and counter.
#pragma once

#include "types.cuh"

namespace bitkernels::cuda {

// The bits of eight neighbours of a row, as reference.state_random_bits has them: one draw of Philox4x32-10.
class RandomBits {
 public:
  __device__ RandomBits(int64_t seed, int64_t position, int64_t row, int64_t group)
      : words_{static_cast<uint32_t>(group), static_cast<uint32_t>(row), static_cast<uint32_t>(position),
               static_cast<uint32_t>(position >> 32)} {
    uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32_t high_0 = __umulhi(words_[0], 0xD2511F53u), low_0 = words_[0] * 0xD2511F53u;
      const uint32_t high_2 = __umulhi(words_[2], 0xCD9E8D57u), low_2 = words_[2] * 0xCD9E8D57u;
      words_[0] = high_2 ^ words_[1] ^ key_0;
      words_[1] = low_2;
      words_[2] = high_0 ^ words_[3] ^ key_1;
      words_[3] = low_0;
      key_0 += 0x9E3779B9u;
      key_1 += 0xBB67AE85u;
    }
  }

  // i is a constant once loops are unrolled.
  __device__ uint32_t operator[](int i) const { return i % 2 ? words_[i / 2] >> 16 : words_[i / 2] & 0xffffu; }

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

}  // namespace bitkernels::cuda
