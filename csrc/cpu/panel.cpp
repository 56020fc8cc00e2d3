#include "panel.h"

#include <algorithm>

#include "cpu_features.h"

namespace bitkernels::cpu {
namespace {

void transpose_portable(const uint32_t* const* rows, int64_t words, uint32_t* panel) {
  for (int64_t i = 0; i < words; ++i) {
    for (int r = 0; r < kPanelRows; ++r) panel[i * kPanelRows + r] = rows[r][i];
  }
}

}  // namespace

PanelTranspose panel_transpose() {
#if defined(__x86_64__)
  if (path() == Path::kAvx512) return transpose_panel_avx512;
  if (path() == Path::kAvx2) return transpose_panel_avx2;
#endif
  return transpose_portable;
}

void load_panel(PanelTranspose transpose, const uint32_t* w, int64_t N, int64_t words, int64_t n0, uint32_t* panel) {
  const uint32_t* rows[kPanelRows];
  for (int r = 0; r < kPanelRows; ++r) rows[r] = w + std::min(n0 + r, N - 1) * words;
  transpose(rows, words, panel);
}

}  // namespace bitkernels::cpu
