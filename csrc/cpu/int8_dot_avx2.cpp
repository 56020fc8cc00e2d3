// Integer dot products for AVX2: vpmaddubsw adds pairs of products in 16 bits, widened before they can saturate.
#include <immintrin.h>

#include "int8_dot.h"

namespace bitkernels::cpu {
namespace {

constexpr int kLanes = 8;
constexpr int kVectors = 4;  // registers of rows, half a panel
constexpr int kRows = kVectors * kLanes;

// A 16-bit lane takes two products a plane, each of magnitude 3 * 128 at most even for the invalid code 3:
// 8 words of 4 planes stay within 24576.
constexpr int kWordsIn16Bits = 8;

__m256i broadcast(const int8_t* four) {
  int32_t value;
  __builtin_memcpy(&value, four, sizeof(value));
  return _mm256_set1_epi32(value);
}

template <int kTokens>
void accumulate_tokens(const uint32_t* chunk, int words, const int8_t* q, int64_t stride, int32_t* dots) {
  const __m256i mask = _mm256_set1_epi32(kPlaneMask), ones = _mm256_set1_epi16(1);
  __m256i sums[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) {
      sums[t][v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(dots + t * kPanelRows + v * kLanes));
    }
  }
  for (int i = 0; i < words;) {
    const int end = words - i < kWordsIn16Bits ? words : i + kWordsIn16Bits;
    __m256i narrow[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) narrow[t][v] = _mm256_setzero_si256();
    }
    for (; i < end; ++i, chunk += kPanelRows, q += kTernaryPerWord) {
      __m256i w[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        w[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(chunk + v * kLanes));
      }
#pragma GCC unroll 4
      for (int j = 0; j < kPlanes; ++j) {
        for (int v = 0; v < kVectors; ++v) {
          const __m256i plane = _mm256_and_si256(w[v], mask);
          w[v] = _mm256_srli_epi32(w[v], 2);
          for (int t = 0; t < kTokens; ++t) {
            const __m256i pairs = _mm256_maddubs_epi16(plane, broadcast(q + t * stride + 4 * j));
            narrow[t][v] = _mm256_add_epi16(narrow[t][v], pairs);
          }
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) {
        sums[t][v] = _mm256_add_epi32(sums[t][v], _mm256_madd_epi16(narrow[t][v], ones));
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(dots + t * kPanelRows + v * kLanes), sums[t][v]);
    }
  }
}

void accumulate(const uint32_t* chunk, int words, const int8_t* q, int64_t stride, int64_t tokens, int32_t* dots) {
  for (int64_t t = 0; t < tokens; t += 2) {
    const auto kernel = t + 1 < tokens ? accumulate_tokens<2> : accumulate_tokens<1>;
    for (int r = 0; r < kPanelRows; r += kRows) {
      kernel(chunk + r, words, q + t * stride, stride, dots + t * kPanelRows + r);
    }
  }
}

}  // namespace

const Int8Kernels int8_dot_avx2{transpose_chunk_avx2, accumulate, "avx2"};

}  // namespace bitkernels::cpu
