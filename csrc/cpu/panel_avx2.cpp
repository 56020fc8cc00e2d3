// Transposes chunks 8 rows by 8 words at a time.
#include <immintrin.h>

#include "panel.h"

namespace bitkernels::cpu {
namespace {

constexpr int kLanes = 8;

// 8 rows of 8 words: columns become rows.
void transpose_8x8(const uint32_t* const* rows, int64_t word, uint32_t* chunk) {
  __m256i a[8], b[8];
  // Halves first: a[i] holds words 0-3 of rows i and i + 4, a[i + 4] words 4-7.
  for (int i = 0; i < 4; ++i) {
    const __m256i r = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + word));
    const __m256i s = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i + 4] + word));
    a[i] = _mm256_permute2x128_si256(r, s, 0x20);
    a[i + 4] = _mm256_permute2x128_si256(r, s, 0x31);
  }
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 8; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(chunk + i * kPanelRows), a[i]);
}

}  // namespace

void transpose_chunk_avx2(const uint32_t* const* rows, int64_t word, int count, uint32_t* chunk) {
  const int whole = count / 8 * 8;
  for (int i = 0; i < whole; i += 8) {
    for (int r = 0; r < kPanelRows; r += kLanes) transpose_8x8(rows + r, word + i, chunk + i * kPanelRows + r);
  }
  if (whole < count) transpose_chunk_portable(rows, word + whole, count - whole, chunk + whole * kPanelRows);
}

}  // namespace bitkernels::cpu
