// Stochastic rounding of float32 to 16 bits, with random bits that depend on nothing but their key and counter.
#pragma once

#include "mixer_vector.h"

namespace bitkernels::cpu {
namespace {

// Philox4x32-10 (Salmon et al., 2011): four words from a counter of four words and a key of two.
struct Philox {
  static constexpr int kRounds = 10;
  uint32_t keys[kRounds][2];

  struct Product {
    VecU low, high;
  };

  // The instructions for 64-bit products multiply every other word.
  static Product product(VecU a, uint32_t b) {
#if defined(__AVX512F__)
    const __m512i x = as_bits<__m512i>(a), y = _mm512_set1_epi32(static_cast<int>(b));
    const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
    return {as_bits<VecU>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))),
            as_bits<VecU>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd))};
#elif defined(__AVX2__)
    const __m256i x = as_bits<__m256i>(a), y = _mm256_set1_epi32(static_cast<int>(b));
    const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
    return {as_bits<VecU>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)),
            as_bits<VecU>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa))};
#else
    // Of each half of a word, so that no product exceeds 32 bits.
    const VecU low = a & 0xffffu, high = a >> 16;
    const uint32_t b_low = b & 0xffffu, b_high = b >> 16;
    const VecU middle = high * b_low + (low * b_low >> 16);
    return {a * b, high * b_high + (middle >> 16) + ((low * b_high + (middle & 0xffffu)) >> 16)};
#endif
  }

  explicit Philox(uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (auto& of_round : keys) {
      of_round[0] = k0;
      of_round[1] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

  // kDraws independent chains of instructions; words hold the counters, and then the draws.
  template <int kDraws>
  void draw(VecU (&words)[kDraws][4]) const {
    for (const auto& key : keys) {
      for (auto& word : words) {
        const Product first = product(word[0], 0xD2511F53u), second = product(word[2], 0xCD9E8D57u);
        word[0] = second.high ^ word[1] ^ key[0];
        word[1] = second.low;
        word[2] = first.high ^ word[3] ^ key[1];
        word[3] = first.low;
      }
    }
  }
};

// What the state of one request is rounded with: element n of a row takes half n % 2 of word n / 2 % 4 of the
// draw whose counter is (n / 8, row, position) and whose key is the request's seed.
struct RandomBits {
  Philox generator;
  uint64_t position;

  RandomBits(uint64_t seed, uint64_t position) : generator(seed), position(position) {}

  // 8 * kLanes<float> elements, from n, a multiple of 8, of kRows rows: 16 bits in each lane of 8 vectors a row.
  template <int kRows>
  void fill(VecU (&bits)[kRows][8], int64_t row, int64_t n) const {
    VecU counter;
    for (int i = 0; i < kLanes<float>; ++i) counter[i] = static_cast<uint32_t>(n / 8 + i);
    VecU words[kRows][4];
    for (int r = 0; r < kRows; ++r) {
      words[r][0] = counter;
      words[r][1] = VecU{} + static_cast<uint32_t>(row + r);
      words[r][2] = VecU{} + static_cast<uint32_t>(position);
      words[r][3] = VecU{} + static_cast<uint32_t>(position >> 32);
    }
    generator.draw(words);
    for (int r = 0; r < kRows; ++r) spread(words[r], bits[r]);
  }

 private:
  static void spread(const VecU (&words)[4], VecU (&bits)[8]) {
#if defined(__AVX512BW__)
    // A vector takes two draws. Of lanes 0 to 7, which take one, 0 to 3 have the halves of its words 0 and 1, the low
    // one first, and 4 to 7 those of words 2 and 3.
    constexpr __mmask32 kFirst = 0x00550055, kLast = 0x55005500;
    const __m512i step = _mm512_set1_epi32(4);
    __m512i index = _mm512_setr_epi32(0, 1, 32, 33, 0, 1, 32, 33, 2, 3, 34, 35, 2, 3, 34, 35);
    const auto word = [&](int i) { return as_bits<__m512i>(words[i]); };
    for (int v = 0; v < 8; ++v) {
      const __m512i first = _mm512_maskz_permutex2var_epi16(kFirst, word(0), index, word(1));
      const __m512i last = _mm512_maskz_permutex2var_epi16(kLast, word(2), index, word(3));
      bits[v] = as_bits<VecU>(_mm512_or_si512(first, last));
      index = _mm512_add_epi32(index, step);
    }
#else
    uint32_t lanes[4][kLanes<float>];
    __builtin_memcpy(lanes, words, sizeof(lanes));
    for (int v = 0; v < 8; ++v) {
      for (int i = 0; i < kLanes<float>; ++i) {
        const int element = v * kLanes<float> + i;
        bits[v][i] = lanes[element / 2 % 4][element / 8] >> (element % 2 * 16) & 0xffffu;
      }
    }
#endif
  }
};

// Up in magnitude with the probability of the 16 bits that are cut off; infinity and NaN as they are.
inline VecU16 narrow_randomly(BFloat16, Vec<float> value, VecU random) {
  const VecU bits = as_bits<VecU>(value);
  const VecU up = (bits & 0x7f800000u) == 0x7f800000u ? bits : bits + random;
  const VecU quiet = value == value ? VecU{} : VecU{} + 0x40u;
  return narrow_bits(up >> 16 | quiet);
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
  return narrow_bits(result | (bits & 0x80000000u) >> 16);
}

template <typename E>
inline void store_randomly(E* to, Vec<float> value, VecU random, int64_t count) {
  const VecU16 bits = narrow_randomly(E{}, value, random);
  const int64_t bytes = 2 * (count < kLanes<float> ? count : kLanes<float>);
  __builtin_memcpy(to, &bits, static_cast<size_t>(bytes));
}

}  // namespace
}  // namespace bitkernels::cpu
