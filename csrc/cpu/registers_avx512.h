// What the AVX-512 kernels share: 16 rows of 16 words with rows and columns exchanged, in registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bitkernels::cpu {
namespace {

constexpr int kLanes = 16;

// Lane q of 128 bits of out[4 l] is lane l of a[4 q].
inline void transpose_lanes(const __m512i* a, __m512i* out) {
  const __m512i low01 = _mm512_shuffle_i32x4(a[0], a[4], 0x44), high01 = _mm512_shuffle_i32x4(a[0], a[4], 0xee);
  const __m512i low23 = _mm512_shuffle_i32x4(a[8], a[12], 0x44), high23 = _mm512_shuffle_i32x4(a[8], a[12], 0xee);
  out[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
  out[4] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
  out[8] = _mm512_shuffle_i32x4(high01, high23, 0x88);
  out[12] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
}

// out[i] holds word `word + i` of 16 rows, zero from `count` on.
inline void transpose_16x16(const uint32_t* const* rows, int64_t word, int count, __m512i* out) {
  const __mmask16 valid = static_cast<__mmask16>((1u << count) - 1);
  __m512i a[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi32(valid, rows[i] + word);
  for (int i = 0; i < 16; i += 2) {
    out[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    out[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(out[i], out[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(out[i], out[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(out[i + 1], out[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(out[i + 1], out[i + 3]);
  }
  // a[4 q + j]: lane l of 128 bits holds word 4 l + j of rows 4 q to 4 q + 3.
  for (int j = 0; j < 4; ++j) transpose_lanes(a + j, out + j);
}

// A load whose value stays in a register: gcc would load it again for each use, and loads are what it would wait for.
inline __m512i load_once(const void* from) {
  __m512i v = _mm512_load_si512(from);
  asm("" : "+v"(v));
  return v;
}

}  // namespace
}  // namespace bitkernels::cpu
