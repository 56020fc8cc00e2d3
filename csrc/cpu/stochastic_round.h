// Stochastic rounding of float32 to 16 bits, with random bits that depend on nothing but their key and counter.
#pragma once

#include "mixer_vector.h"

namespace bitkernels::cpu {
namespace {

// Philox4x32-10 (Salmon et al., 2011): four words from a counter of four words and a key of two. Words lie in lanes of
// 64 bits, where a product leaves both of its halves; what is in the upper half of a word is never looked at.
using VecL = Vec<uint64_t>;

struct Philox {
  static constexpr int kRounds = 10;
  uint64_t keys[kRounds][2];

  static VecL product(VecL a, uint32_t b) {
#if defined(__AVX512F__)
    return as_bits<VecL>(_mm512_mul_epu32(as_bits<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
    return as_bits<VecL>(_mm256_mul_epu32(as_bits<__m256i>(a), _mm256_set1_epi64x(b)));
#else
    return (a & 0xffffffffu) * b;
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

  // kDraws independent chains of instructions; words hold the counters, and then the draws. Without rounds in a loop no
  // word is moved to the place of another.
  template <int kDraws>
  void draw(VecL (&words)[kDraws][4]) const {
#pragma GCC unroll 10
    for (const auto& key : keys) {
#pragma GCC unroll 4
      for (auto& word : words) {
        const VecL first = product(word[0], 0xD2511F53u), second = product(word[2], 0xCD9E8D57u);
        word[0] = second >> 32 ^ word[1] ^ key[0];
        word[1] = second;
        word[2] = first >> 32 ^ word[3] ^ key[1];
        word[3] = first;
      }
    }
  }
};

// What the state of one request is rounded with: element n of a row takes half n % 2 of word n / 2 % 4 of the
// draw whose counter is (n / 8, row, position) and whose key is the request's seed.
struct RandomBits {
  static constexpr int kElements = 8 * kLanes<float>;  // drawn at once of a row

  Philox generator;
  uint64_t position;

  RandomBits(uint64_t seed, uint64_t position) : generator(seed), position(position) {}

  // 16 bits for each of kElements elements, from n, a multiple of 8, of kRows rows.
  template <int kRows>
  void fill(uint16_t (&bits)[kRows][kElements], int64_t row, int64_t n) const {
    constexpr int kDraws = kLanes<uint64_t>, kVectors = kElements / 8 / kDraws;
    // Words 0 and 1 of a draw, and 2 and 3, come from one lane each, of two vectors that are then merged pair by pair:
    // first the even lanes, then the odd ones.
    VecL order, first, last;
    for (int i = 0; i < kDraws; ++i) {
      order[i] = i / 2 + i % 2 * (kDraws / 2);
      first[i] = i / 2 * 2 + i % 2 * kDraws;
      last[i] = first[i] + 1;
    }
    VecL words[kRows * kVectors][4];
#pragma GCC unroll 4
    for (int i = 0; i < kRows * kVectors; ++i) {
      words[i][0] = order + static_cast<uint64_t>(n / 8 + i % kVectors * kDraws);
      words[i][1] = VecL{} + static_cast<uint64_t>(row + i / kVectors);
      words[i][2] = VecL{} + position;
      words[i][3] = VecL{} + (position >> 32);
    }
    generator.draw(words);
#pragma GCC unroll 4
    for (int i = 0; i < kRows * kVectors; ++i) {
      const VecL low = (words[i][0] & 0xffffffffu) | words[i][1] << 32;
      const VecL high = (words[i][2] & 0xffffffffu) | words[i][3] << 32;
      const VecL pairs[2] = {__builtin_shuffle(low, high, first), __builtin_shuffle(low, high, last)};
      __builtin_memcpy(bits[i / kVectors] + i % kVectors * 8 * kDraws, pairs, sizeof(pairs));
    }
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
inline void store_randomly(E* to, Vec<float> value, const uint16_t* random, int64_t count) {
  VecU16 drawn;
  __builtin_memcpy(&drawn, random, sizeof(drawn));
  const VecU16 bits = narrow_randomly(E{}, value, widen_bits(drawn));
  const int64_t bytes = 2 * (count < kLanes<float> ? count : kLanes<float>);
  __builtin_memcpy(to, &bits, static_cast<size_t>(bytes));
}

// Two whole vectors.
template <typename E>
inline void store_randomly(E* to, Vec<float> a, Vec<float> b, const uint16_t* random) {
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<E, BFloat16>) {
    // In lanes of 16 bits: what is cut off, plus the random bits, carries into what is kept.
    VecI even;
    for (int i = 0; i < kLanes<float>; ++i) even[i] = (4 * i + 2) << 16 | 4 * i;
    const __m512i low = as_bits<__m512i>(even), ones = _mm512_set1_epi16(1), in_a = as_bits<__m512i>(a);
    const __m512i kept = _mm512_permutex2var_epi16(in_a, _mm512_add_epi16(low, ones), as_bits<__m512i>(b));
    const __m512i cut = _mm512_permutex2var_epi16(in_a, low, as_bits<__m512i>(b));
    const __m512i drawn = _mm512_loadu_si512(random);
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    if (_mm512_cmpeq_epi16_mask(_mm512_and_si512(kept, exponent), exponent) == 0) [[likely]] {
      const __mmask32 carry = _mm512_cmplt_epu16_mask(_mm512_add_epi16(cut, drawn), drawn);
      _mm512_storeu_si512(to, _mm512_mask_add_epi16(kept, carry, kept, ones));
      return;
    }
  }
#endif
  store_randomly(to, a, random, kLanes<float>);
  store_randomly(to + kLanes<float>, b, random + kLanes<float>, kLanes<float>);
}

}  // namespace
}  // namespace bitkernels::cpu
