// Lookup kernels for AVX-512 with VBMI and VNNI, in integers.
//
// Activations become fixed point: integers of at most 2^kBits, in steps of a power of two chosen by the token's
// largest. A table entry, the contribution of the 4 bits of a group, is an integer of 7 kLimbs bits, a byte for each
// 7: limb l of the 16 entries of four groups, one from each byte of a word, is one register. vpermb then looks up 64
// groups, 16 rows by 4 bytes; the lookups of both halves of a byte add up within it, and vpdpbusd adds the four bytes
// of each row. Nothing is rounded between the activations and the finished sum.
#include <immintrin.h>

#include "lookup.h"
#include "registers_avx512.h"

namespace bitkernels::cpu {
namespace {

constexpr int kVectors = kPanelRows / kLanes;
constexpr int kGroups = 8;  // groups of 4 bits in a word
constexpr int kHalves = 2;  // the groups in the low and in the high halves of a word's bytes
constexpr int kTable = 64;  // bytes of one limb of four groups
constexpr int kLimbBits = 7;

// What a chunk holds: words, or the two indices of each, which are worth storing from the second token on.
enum class Chunk { kWords, kIndices };

// Both halves of the bytes of 16 words, as indices for vpermb: byte b of a register looks up table b % 4.
struct Indices {
  __m512i low, high;
};

Indices indices(__m512i words) {
  const __m512i halves = _mm512_set1_epi32(0x0f0f0f0f), table = _mm512_set1_epi32(0x30201000);
  constexpr int kAndOr = 0xea;  // (a & b) | c
  return {_mm512_ternarylogic_epi32(words, halves, table, kAndOr),
          _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4), halves, table, kAndOr)};
}

template <Chunk kChunk>
void load_chunk(const uint32_t* const* rows, int64_t word, int count, uint32_t* chunk) {
  constexpr int kStride = kChunk == Chunk::kWords ? kPanelRows : kHalves * kPanelRows;
  for (int v = 0; v < kVectors; ++v) {
    __m512i w[16];
    transpose_16x16(rows + v * kLanes, word, count, w);
    uint32_t* out = chunk + v * kLanes;
    for (int i = 0; i < 16; ++i, out += kStride) {
      if constexpr (kChunk == Chunk::kWords) {
        _mm512_store_si512(out, w[i]);
      } else {
        const Indices both = indices(w[i]);
        _mm512_store_si512(out, both.low);
        _mm512_store_si512(out + kPanelRows, both.high);
      }
    }
  }
}

template <Chunk kChunk>
Indices load_indices(const uint32_t* chunk) {
  if constexpr (kChunk == Chunk::kWords) return indices(load_once(chunk));
  return {load_once(chunk), load_once(chunk + kPanelRows)};
}

// Bit j of group g of a word adds values[4 g + j] to base[4 g].
struct BitValues {
  alignas(64) int32_t values[4 * kGroups], base[4 * kGroups];
};

// Lanes of four: all hold minus the sum of the four.
__m512i minus_sums_of_four(__m512i v) {
  v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
  v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
  return _mm512_sub_epi32(_mm512_setzero_si512(), v);
}

template <Format kFormat>
BitValues bit_values(const float* x, __m512 shift) {
  BitValues bits;
  if constexpr (kFormat == Format::kSign) {  // 2 b - 1
    for (int i = 0; i < kSignsPerWord; i += kLanes) {
      const __m512i v = _mm512_cvtps_epi32(_mm512_scalef_ps(_mm512_loadu_ps(x + i), shift));
      _mm512_store_si512(bits.values + i, _mm512_add_epi32(v, v));
      _mm512_store_si512(bits.base + i, minus_sums_of_four(v));
    }
  } else {  // 2 b1 + b0 - 1
    const __m512i v = _mm512_cvtps_epi32(_mm512_scalef_ps(_mm512_loadu_ps(x), shift));
    const __m512i pairs = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    for (int i = 0; i < 2; ++i) {
      const __m512i twice = _mm512_permutexvar_epi32(_mm512_add_epi32(pairs, _mm512_set1_epi32(8 * i)), v);
      _mm512_store_si512(bits.values + i * kLanes, _mm512_mask_add_epi32(twice, 0xaaaa, twice, twice));
      _mm512_store_si512(bits.base + i * kLanes, minus_sums_of_four(_mm512_maskz_mov_epi32(0x5555, twice)));
    }
  }
  return bits;
}

// The 16 entries of a group: lane l of 128 bits holds limb l of each.
template <int kLimbs>
__m512i entries_by_limb(const BitValues& bits, int group) {
  constexpr __mmask16 kLanesWithBit[] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};
  __m512i entries = _mm512_set1_epi32(bits.base[4 * group]);
  for (int j = 0; j < 4; ++j) {
    const __m512i value = _mm512_set1_epi32(bits.values[4 * group + j]);
    entries = _mm512_mask_add_epi32(entries, kLanesWithBit[j], entries, value);
  }
  // The last limb has the sign, the others are cut off at kLimbBits.
  constexpr int64_t kLimbAt[] = {0, kLimbBits, 2 * kLimbBits, 3 * kLimbBits};
  constexpr int64_t kStarts = kLimbAt[0] | kLimbAt[1] << 8 | kLimbAt[2] << 16 | kLimbAt[3] << 24;
  const __m512i starts = _mm512_set1_epi64(kStarts | (kStarts + 0x20202020) << 32);
  const __m512i kept = _mm512_set1_epi32(kLimbs == 3 ? 0x00ff7f7f : 0xff7f7f7f);
  const __m512i limbs = _mm512_and_si512(_mm512_multishift_epi64_epi8(starts, entries), kept);
  const __m512i bytes = _mm512_set_epi32(0x3f3b3733, 0x2f2b2723, 0x1f1b1713, 0x0f0b0703,   // limb 3
                                         0x3e3a3632, 0x2e2a2622, 0x1e1a1612, 0x0e0a0602,   // limb 2
                                         0x3d393531, 0x2d292521, 0x1d191511, 0x0d090501,   // limb 1
                                         0x3c383430, 0x2c282420, 0x1c181410, 0x0c080400);  // limb 0
  return _mm512_permutexvar_epi8(bytes, limbs);
}

// The largest magnitude of n values, n a multiple of 16, as bits: NaN exceeds infinity.
uint32_t largest_bits(const float* x, int64_t n) {
  __m512i largest = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < n; i += kLanes) {
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
  }
  return _mm512_reduce_max_epu32(largest);
}

// 2^e for -149 <= e <= 127.
float power_of_two(int e) { return _mm_cvtss_f32(_mm_scalef_ss(_mm_set_ss(1), _mm_set_ss(static_cast<float>(e)))); }

template <Format kFormat, int kLimbs>
float tabulate(const float* x, int64_t words, void* tables) {
  // Up to four activations add up to an entry, which has a sign.
  constexpr int kBits = kLimbBits * kLimbs - 4;
  constexpr int kPerWord = per_word(kFormat);
  const uint32_t largest = largest_bits(x, words * kPerWord);
  const bool finite = largest < 0x7f800000u;
  // All magnitudes are below 2^exponent; the step, 2^(exponent - kBits), is no less than fp32 can hold.
  const int own = static_cast<int>(largest >> 23) - 126;
  const int exponent = !finite ? 0 : own > kBits - 149 ? own : kBits - 149;
  const __m512 shift = _mm512_set1_ps(static_cast<float>(kBits - exponent));
  uint8_t* out = static_cast<uint8_t*>(tables);
  for (int64_t i = 0; i < words; ++i) {
    const BitValues bits = bit_values<kFormat>(x + i * kPerWord, shift);
    for (int half = 0; half < kHalves; ++half, out += kLimbs * kTable) {
      __m512i by_group[16], by_limb[16];  // every fourth is used
      for (int q = 0; q < 4; ++q) by_group[4 * q] = entries_by_limb<kLimbs>(bits, kHalves * q + half);
      transpose_lanes(by_group, by_limb);
      for (int l = 0; l < kLimbs; ++l) _mm512_store_si512(out + l * kTable, by_limb[4 * l]);
    }
  }
  return finite ? power_of_two(exponent - kBits) : __builtin_nanf("");
}

// sums[l * kPanelRows + r]: limb l of row r.
template <int kLimbs, Chunk kChunk>
void accumulate(const uint32_t* chunk, int words, const void* tables, int64_t stride, int64_t tokens, void* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t t = 0; t < tokens; ++t) {
    const uint8_t* table = static_cast<const uint8_t*>(tables) + t * stride;
    int32_t* sum = static_cast<int32_t*>(sums) + t * kLimbs * kPanelRows;
    __m512i s[kLimbs][kVectors];
    for (int l = 0; l < kLimbs; ++l) {
      for (int v = 0; v < kVectors; ++v) s[l][v] = _mm512_load_si512(sum + l * kPanelRows + v * kLanes);
    }
    const uint32_t* from = chunk;
    constexpr int kStride = kChunk == Chunk::kWords ? kPanelRows : kHalves * kPanelRows;
    for (int i = 0; i < words; ++i, from += kStride, table += kHalves * kLimbs * kTable) {
      __m512i low[kLimbs], high[kLimbs];
      for (int l = 0; l < kLimbs; ++l) {
        low[l] = load_once(table + l * kTable);
        high[l] = load_once(table + (kLimbs + l) * kTable);
      }
      for (int v = 0; v < kVectors; ++v) {
        const Indices in = load_indices<kChunk>(from + v * kLanes);
        for (int l = 0; l < kLimbs; ++l) {
          const __m512i found =
              _mm512_add_epi8(_mm512_permutexvar_epi8(in.low, low[l]), _mm512_permutexvar_epi8(in.high, high[l]));
          s[l][v] =
              l + 1 < kLimbs ? _mm512_dpbusd_epi32(s[l][v], found, ones) : _mm512_dpbusd_epi32(s[l][v], ones, found);
        }
      }
    }
    for (int l = 0; l < kLimbs; ++l) {
      for (int v = 0; v < kVectors; ++v) _mm512_store_si512(sum + l * kPanelRows + v * kLanes, s[l][v]);
    }
  }
}

// Two limbs together stay below 2^14 * groups, that is within 32 bits up to kLookupAvx512MaxWords.
static_assert(kLookupAvx512MaxWords * kGroups <= 1 << 17);

template <int kLimbs>
void finish(const void* sums, float factor, float* dots) {
  static_assert(kLimbs == 3 || kLimbs == 4);
  constexpr int kLow = kLimbs - 2;  // limbs below the upper two
  for (int r = 0; r < kPanelRows; r += kLanes) {
    const int32_t* sum = static_cast<const int32_t*>(sums) + r;
    const auto two_limbs = [&](int l) {
      const __m512i upper = _mm512_load_si512(sum + (l + 1) * kPanelRows);
      return _mm512_add_epi32(_mm512_slli_epi32(upper, kLimbBits), _mm512_load_si512(sum + l * kPanelRows));
    };
    const __m512 high = _mm512_cvtepi32_ps(two_limbs(kLow));
    const __m512 low = _mm512_cvtepi32_ps(kLow == 1 ? _mm512_load_si512(sum) : two_limbs(0));
    const __m512 both = _mm512_fmadd_ps(high, _mm512_set1_ps(1 << kLimbBits * kLow), low);
    _mm512_storeu_ps(dots + r, _mm512_mul_ps(both, _mm512_set1_ps(factor)));
  }
}

template <Format kFormat, int kLimbs, Chunk kChunk>
constexpr LookupKernels<float> kKernels{
    .name = kLimbs == 3 ? "avx512, three limbs" : "avx512, four limbs",
    .table_bytes = kHalves * kLimbs * kTable,
    .sum_bytes = kLimbs * kPanelRows * sizeof(int32_t),
    .tabulate = tabulate<kFormat, kLimbs>,
    .load = load_chunk<kChunk>,
    .accumulate = accumulate<kLimbs, kChunk>,
    .finish = finish<kLimbs>,
};

template <Format kFormat, int kLimbs>
const LookupKernels<float>& kernels(int64_t M) {
  return M == 1 ? kKernels<kFormat, kLimbs, Chunk::kWords> : kKernels<kFormat, kLimbs, Chunk::kIndices>;
}

}  // namespace

// Three limbs are steps of at most 2^-16 of a token's largest activation, where bf16 rounds to 2^-9 of each; four
// hold an fp32 value as large as the largest exactly.
const LookupKernels<float>& lookup_avx512(Format format, DType dtype, int64_t M) {
  const bool short_ones = dtype == DType::kBFloat16;
  if (format == Format::kSign) return short_ones ? kernels<Format::kSign, 3>(M) : kernels<Format::kSign, 4>(M);
  return short_ones ? kernels<Format::kTernary, 3>(M) : kernels<Format::kTernary, 4>(M);
}

}  // namespace bitkernels::cpu
