// Lookup kernels for AVX-512: a table of 16 floats is one register, and vpermps looks up 16 rows at once
// by the low 4 bits of each lane.
#include <immintrin.h>

#include "lookup.h"
#include "panel.h"

namespace bitkernels::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = kPanelRows / kLanes;
constexpr int kGroups = 8;  // groups of 4 bits in a word
constexpr int kTableWidth = kGroups * kLanes;
constexpr int kBlockTokens = 4;

void tabulate_sign(const float* x, int64_t words, float* tables) {
  // Lane i holds the sign that bit j of i stands for.
  const __m512 one = _mm512_set1_ps(1), minus = _mm512_set1_ps(-1);
  const __m512 s0 = _mm512_mask_blend_ps(0xaaaa, minus, one), s1 = _mm512_mask_blend_ps(0xcccc, minus, one);
  const __m512 s2 = _mm512_mask_blend_ps(0xf0f0, minus, one), s3 = _mm512_mask_blend_ps(0xff00, minus, one);
  for (int64_t i = 0; i < words * kGroups; ++i, x += 4, tables += kLanes) {
    // Products with signs are exact, so each fused operation rounds as an addition does.
    const __m512 low = _mm512_fmadd_ps(s0, _mm512_set1_ps(x[0]), _mm512_mul_ps(s1, _mm512_set1_ps(x[1])));
    const __m512 high = _mm512_fmadd_ps(s2, _mm512_set1_ps(x[2]), _mm512_mul_ps(s3, _mm512_set1_ps(x[3])));
    _mm512_store_ps(tables, _mm512_add_ps(low, high));
  }
}

void tabulate_ternary(const float* x, int64_t words, float* tables) {
  const __m512 low = _mm512_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2);
  const __m512 high = _mm512_setr_ps(-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2);
  for (int64_t i = 0; i < words * kGroups; ++i, x += 2, tables += kLanes) {
    const __m512 second = _mm512_mul_ps(high, _mm512_set1_ps(x[1]));
    _mm512_store_ps(tables, _mm512_fmadd_ps(low, _mm512_set1_ps(x[0]), second));
  }
}

template <int kTokens>
void accumulate_tokens(const uint32_t* panel, int64_t words, const float* tables, int64_t stride, float* dots,
                       const uint32_t* next) {
  __m512 sums[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < words; ++i, panel += kPanelRows, next += kPanelRows, tables += kTableWidth) {
    for (int line = 0; line < kPanelRows; line += 16) _mm_prefetch(next + line, _MM_HINT_T0);
    __m512i w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = _mm512_load_si512(panel + v * kLanes);
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      for (int t = 0; t < kTokens; ++t) {
        const __m512 table = _mm512_load_ps(tables + t * stride + g * kLanes);
        for (int v = 0; v < kVectors; ++v) {
          sums[t][v] = _mm512_add_ps(sums[t][v], _mm512_permutexvar_ps(w[v], table));
        }
      }
      for (int v = 0; v < kVectors; ++v) w[v] = _mm512_srli_epi32(w[v], 4);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) _mm512_store_ps(dots + t * kPanelRows + v * kLanes, sums[t][v]);
  }
}

void accumulate(const uint32_t* panel, int64_t words, const float* tables, int64_t stride, int tokens, float* dots,
                const uint32_t* next) {
  switch (tokens) {
    case 1: return accumulate_tokens<1>(panel, words, tables, stride, dots, next);
    case 2: return accumulate_tokens<2>(panel, words, tables, stride, dots, next);
    case 3: return accumulate_tokens<3>(panel, words, tables, stride, dots, next);
    case 4: return accumulate_tokens<4>(panel, words, tables, stride, dots, next);
  }
}

constexpr LookupKernels<float> kSign{kTableWidth, kBlockTokens, tabulate_sign, accumulate};
constexpr LookupKernels<float> kTernary{kTableWidth, kBlockTokens, tabulate_ternary, accumulate};

}  // namespace

const LookupKernels<float>& lookup_avx512(Format format) { return format == Format::kSign ? kSign : kTernary; }

}  // namespace bitkernels::cpu
