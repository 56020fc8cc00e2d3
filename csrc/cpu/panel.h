// Packed weights as the kernels read them: panels of kPanelRows rows, in chunks of kChunkWords words of each row.
// A kernel turns a chunk about, so that a register holds the same columns of as many rows as it has lanes.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace bitkernels::cpu {

constexpr int kPanelRows = 64;
constexpr int kChunkWords = 16;  // a cache line of each row

// The largest form a kernel keeps a chunk in: two words for each.
constexpr int kMaxChunkWords = 2 * kChunkWords * kPanelRows;

// Loads `count` <= kChunkWords words of kPanelRows rows, from word `word` of each, into the form a kernel wants. The
// chunk has room for kChunkWords of them.
using LoadChunk = void (*)(const uint32_t* const* rows, int64_t word, int count, uint32_t* chunk);

// chunk[w * kPanelRows + r] = rows[r][word + w].
void transpose_chunk_portable(const uint32_t* const* rows, int64_t word, int count, uint32_t* chunk);
void transpose_chunk_avx2(const uint32_t* const* rows, int64_t word, int count, uint32_t* chunk);

// Calls f(rows, word, count) for each chunk of the rows n0 to n0 + kPanelRows of w [N, words]; the last row stands
// in for rows beyond N. Meanwhile it asks memory for the next panel, front to back: the chunks themselves jump from
// row to row, which the hardware does not foresee.
template <typename F>
[[maybe_unused]] static void for_each_chunk(const uint32_t* w, int64_t N, int64_t words, int64_t n0, const F& f) {
  const uint32_t* rows[kPanelRows];
  for (int64_t r = 0; r < kPanelRows; ++r) rows[r] = w + std::min(n0 + r, N - 1) * words;
  const int64_t next_rows = std::clamp<int64_t>(N - n0 - kPanelRows, 0, kPanelRows);
  const uint32_t* next = rows[0] + kPanelRows * words;
  for (int64_t word = 0; word < words; word += kChunkWords) {
    for (int64_t i = 0; i < next_rows; ++i) __builtin_prefetch(next + word * next_rows + i * kChunkWords, 0, 2);
    f(rows, word, static_cast<int>(std::min<int64_t>(kChunkWords, words - word)));
  }
}

}  // namespace bitkernels::cpu
