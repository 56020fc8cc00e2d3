// Transposes panels 16 rows by 16 words at a time.
#include <immintrin.h>

#include "panel.h"

namespace bitkernels::cpu {
namespace {

constexpr int kLanes = 16;

// 16 rows of up to 16 words: columns become rows.
void transpose_16x16(const uint32_t* const* rows, int64_t word, int count, uint32_t* panel) {
  const __mmask16 valid = static_cast<__mmask16>((1u << count) - 1);
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi32(valid, rows[i] + word);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 q + j]: lane l of 128 bits holds words 4 l + j of rows 4 q to 4 q + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x44),
                  high01 = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xee);
    b[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    b[j + 4] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    b[j + 8] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    b[j + 12] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) {
    if (i < count) _mm512_store_si512(panel + i * kPanelRows, b[i]);
  }
}

}  // namespace

void transpose_panel_avx512(const uint32_t* const* rows, int64_t words, uint32_t* panel) {
  for (int64_t i = 0; i < words; i += 16) {
    const int count = static_cast<int>(words - i < 16 ? words - i : 16);
    for (int v = 0; v < kPanelRows / kLanes; ++v) {
      transpose_16x16(rows + v * kLanes, i, count, panel + i * kPanelRows + v * kLanes);
    }
  }
}

}  // namespace bitkernels::cpu
