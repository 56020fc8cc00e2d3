// Integer dot products with VNNI: vpdpbusd adds four products of a code and an activation to each of 16 rows.
#include <immintrin.h>

#include "int8_dot.h"
#include "registers_avx512.h"

namespace bitkernels::cpu {
namespace {

constexpr int kVectors = kPanelRows / kLanes;
constexpr int kTokens = 4;  // whose sums fit in registers, with room for a plane

void load_chunk(const uint32_t* const* rows, int64_t word, int count, uint32_t* chunk) {
  for (int v = 0; v < kVectors; ++v) {
    __m512i w[16];
    transpose_16x16(rows + v * kLanes, word, count, w);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(chunk + i * kPanelRows + v * kLanes, w[i]);
  }
}

__m512i broadcast(const int8_t* four) {
  int32_t value;
  __builtin_memcpy(&value, four, sizeof(value));
  return _mm512_set1_epi32(value);
}

template <int kCount>
void accumulate_tokens(const uint32_t* chunk, int words, const int8_t* q, int64_t stride, int32_t* dots) {
  const __m512i mask = _mm512_set1_epi32(kPlaneMask);
  __m512i sums[kCount][kVectors];
#pragma GCC unroll 4
  for (int t = 0; t < kCount; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_load_si512(dots + t * kPanelRows + v * kLanes);
  }
  for (int i = 0; i < words; ++i, chunk += kPanelRows, q += kTernaryPerWord) {
    __m512i w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) w[v] = load_once(chunk + v * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < kPlanes; ++j) {
      __m512i plane[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        plane[v] = _mm512_and_si512(w[v], mask);
        w[v] = _mm512_srli_epi32(w[v], 2);
      }
#pragma GCC unroll 4
      for (int t = 0; t < kCount; ++t) {
        const __m512i activations = broadcast(q + t * stride + 4 * j);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_dpbusd_epi32(sums[t][v], plane[v], activations);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kCount; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_store_si512(dots + t * kPanelRows + v * kLanes, sums[t][v]);
  }
}

void accumulate(const uint32_t* chunk, int words, const int8_t* q, int64_t stride, int64_t tokens, int32_t* dots) {
  constexpr decltype(&accumulate_tokens<1>) kKernels[] = {accumulate_tokens<1>, accumulate_tokens<2>,
                                                          accumulate_tokens<3>, accumulate_tokens<4>};
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const int64_t count = tokens - t < kTokens ? tokens - t : kTokens;
    kKernels[count - 1](chunk, words, q + t * stride, stride, dots + t * kPanelRows);
  }
}

}  // namespace

const Int8Kernels int8_dot_avx512{load_chunk, accumulate, "avx512"};

}  // namespace bitkernels::cpu
