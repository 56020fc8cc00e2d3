// Integer dot products for AVX2: vpmaddubsw adds pairs of products in 16 bits, widened before they can saturate.
#include <immintrin.h>

#include "int8_dot.h"
#include "panel.h"

namespace bitkernels::cpu {
namespace {

constexpr int kLanes = 8;
constexpr int kVectors = 4;  // registers of rows, half a panel
constexpr int kRows = kVectors * kLanes;

// A 16-bit lane takes two products a plane, each of magnitude 3 * 128 at most even for the invalid code 3:
// 8 words of 4 planes stay within 24576.
constexpr int64_t kWordsIn16Bits = 8;

__m256i broadcast(const int8_t* four) {
  int32_t value;
  __builtin_memcpy(&value, four, sizeof(value));
  return _mm256_set1_epi32(value);
}

template <int kTokens>
void accumulate_tokens(const uint32_t* panel, int64_t words, const int8_t* q, int64_t stride, int32_t* dots,
                       const uint32_t* next) {
  const __m256i mask = _mm256_set1_epi32(kPlaneMask), ones = _mm256_set1_epi16(1);
  __m256i sums[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm256_setzero_si256();
  }
  for (int64_t i = 0; i < words;) {
    const int64_t end = words - i < kWordsIn16Bits ? words : i + kWordsIn16Bits;
    __m256i narrow[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) narrow[t][v] = _mm256_setzero_si256();
    }
    for (; i < end; ++i, panel += kPanelRows, next += kRows, q += kTernaryPerWord) {
      for (int line = 0; line < kRows; line += 16) _mm_prefetch(next + line, _MM_HINT_T0);
      __m256i w[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        w[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + v * kLanes));
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

void accumulate(const uint32_t* panel, int64_t words, const int8_t* q, int64_t stride, int tokens, int32_t* dots,
                const uint32_t* next) {
  const auto kernel = tokens == 1 ? accumulate_tokens<1> : accumulate_tokens<2>;
  for (int r = 0; r < kPanelRows; r += kRows) {
    kernel(panel + r, words, q, stride, dots + r, next + r * words);
  }
}

}  // namespace

const Int8Kernels int8_dot_avx2{2, accumulate};

}  // namespace bitkernels::cpu
