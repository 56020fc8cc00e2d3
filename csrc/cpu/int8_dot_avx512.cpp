// Integer dot products with VNNI: vpdpbusd adds four products of a code and an activation to each of 16 rows.
#include <immintrin.h>

#include "int8_dot.h"
#include "panel.h"

namespace bitkernels::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = kPanelRows / kLanes;

__m512i broadcast(const int8_t* four) {
  int32_t value;
  __builtin_memcpy(&value, four, sizeof(value));
  return _mm512_set1_epi32(value);
}

template <int kTokens>
void accumulate_tokens(const uint32_t* panel, int64_t words, const int8_t* q, int64_t stride, int32_t* dots,
                       const uint32_t* next) {
  const __m512i mask = _mm512_set1_epi32(kPlaneMask);
  __m512i sums[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < words; ++i, panel += kPanelRows, next += kPanelRows, q += kTernaryPerWord) {
    for (int line = 0; line < kPanelRows; line += 16) _mm_prefetch(next + line, _MM_HINT_T0);
    __m512i w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = _mm512_load_si512(panel + v * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < kPlanes; ++j) {
      __m512i plane[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        plane[v] = _mm512_and_si512(w[v], mask);
        w[v] = _mm512_srli_epi32(w[v], 2);
      }
      for (int t = 0; t < kTokens; ++t) {
        const __m512i activations = broadcast(q + t * stride + 4 * j);
        for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_dpbusd_epi32(sums[t][v], plane[v], activations);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) _mm512_store_si512(dots + t * kPanelRows + v * kLanes, sums[t][v]);
  }
}

void accumulate(const uint32_t* panel, int64_t words, const int8_t* q, int64_t stride, int tokens, int32_t* dots,
                const uint32_t* next) {
  switch (tokens) {
    case 1: return accumulate_tokens<1>(panel, words, q, stride, dots, next);
    case 2: return accumulate_tokens<2>(panel, words, q, stride, dots, next);
    case 3: return accumulate_tokens<3>(panel, words, q, stride, dots, next);
    case 4: return accumulate_tokens<4>(panel, words, q, stride, dots, next);
  }
}

}  // namespace

const Int8Kernels int8_dot_avx512{4, accumulate};

}  // namespace bitkernels::cpu
