// Stochastic rounding of float32 to 16 bits, with random bits that depend on nothing but their key and counter.
#pragma once

#include "mixer_vector.h"

namespace bitkernels::cpu {
namespace {

// Philox4x32-10 (Salmon et al., 2011): four words from a counter of four words and a key of two.
struct Philox {
  VecU word[4];

  static VecU high_product(VecU a, uint32_t b) {
    // Of each half of a word, so that no product exceeds 32 bits.
    const VecU low = a & 0xffffu, high = a >> 16;
    const uint32_t b_low = b & 0xffffu, b_high = b >> 16;
    const VecU middle = high * b_low + (low * b_low >> 16);
    return high * b_high + (middle >> 16) + ((low * b_high + (middle & 0xffffu)) >> 16);
  }

  Philox(VecU c0, VecU c1, VecU c2, VecU c3, uint64_t key) : word{c0, c1, c2, c3} {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const VecU even = word[0], odd = word[2];
      word[0] = high_product(odd, 0xCD9E8D57u) ^ word[1] ^ k0;
      word[2] = high_product(even, 0xD2511F53u) ^ word[3] ^ k1;
      word[1] = odd * 0xCD9E8D57u;
      word[3] = even * 0xD2511F53u;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

// What the state of one request is rounded with: element n of a row takes half n % 2 of word n / 2 % 4 of the
// draw whose counter is (n / 8, row, position) and whose key is the request's seed.
struct RandomBits {
  uint64_t seed, position;

  // 8 * kLanes<float> elements of a row from n, a multiple of 8.
  void fill(uint16_t* bits, int64_t row, int64_t n) const {
    VecU counter;
    for (int i = 0; i < kLanes<float>; ++i) counter[i] = static_cast<uint32_t>(n / 8 + i);
    const Philox draw(counter, VecU{} + static_cast<uint32_t>(row), VecU{} + static_cast<uint32_t>(position),
                      VecU{} + static_cast<uint32_t>(position >> 32), seed);
    uint32_t words[4][kLanes<float>];
    __builtin_memcpy(words, draw.word, sizeof(words));
    for (int i = 0; i < kLanes<float>; ++i) {
      const uint32_t row_words[4] = {words[0][i], words[1][i], words[2][i], words[3][i]};
      __builtin_memcpy(bits + 8 * i, row_words, sizeof(row_words));  // the low half of a word first
    }
  }
};

// Up in magnitude with the probability of the 16 bits that are cut off; infinity and NaN as they are.
inline VecU16 narrow_randomly(BFloat16, Vec<float> value, VecU random) {
  const VecU bits = as_bits<VecU>(value);
  const VecU special = __builtin_convertvector(narrow(BFloat16{}, value), VecU);
  const VecU result = (bits & 0x7f800000u) == 0x7f800000u ? special : (bits + random) >> 16;
  return __builtin_convertvector(result, VecU16);
}

inline VecU16 narrow_randomly(Float16, Vec<float> value, VecU random) {
  const VecU bits = as_bits<VecU>(value);
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU cut = random >> 3;  // 13 bits are cut off
  const VecU normal = (magnitude + cut - 0x38000000u) >> 13;
  // Subnormal halves are multiples of 2^-24: 13 bits beyond that as an integer, by its truncation.
  const Vec<float> small = magnitude < 0x38800000u ? as_bits<Vec<float>>(magnitude) : Vec<float>{};
  const VecU subnormal = (as_bits<VecU>(__builtin_convertvector(small * 0x1p37f, VecI)) + cut) >> 13;
  const VecU finite = magnitude < 0x38800000u ? subnormal : (normal > 0x7c00u ? VecU{} + 0x7c00u : normal);
  const VecU special = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : VecU{} + 0x7c00u;
  const VecU result = magnitude >= 0x47800000u ? special : finite;
  return __builtin_convertvector(result | (bits & 0x80000000u) >> 16, VecU16);
}

template <typename E>
inline void store_randomly(E* to, Vec<float> value, const uint16_t* random, int64_t count) {
  VecU16 bits;
  __builtin_memcpy(&bits, random, sizeof(bits));
  bits = narrow_randomly(E{}, value, __builtin_convertvector(bits, VecU));
  const int64_t bytes = 2 * (count < kLanes<float> ? count : kLanes<float>);
  __builtin_memcpy(to, &bits, static_cast<size_t>(bytes));
}

}  // namespace
}  // namespace bitkernels::cpu
