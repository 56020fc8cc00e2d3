#include "panel.h"

namespace bitkernels::cpu {

void transpose_chunk_portable(const uint32_t* const* rows, int64_t word, int count, uint32_t* chunk) {
  for (int i = 0; i < count; ++i) {
    for (int r = 0; r < kPanelRows; ++r) chunk[i * kPanelRows + r] = rows[r][word + i];
  }
}

}  // namespace bitkernels::cpu
