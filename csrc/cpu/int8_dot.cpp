// Portable integer dot products, and the choice among instruction sets.
#include "int8_dot.h"

#include <algorithm>

#include "cpu_features.h"
#include "panel.h"

namespace bitkernels::cpu {
namespace {

constexpr int kGroups = kTernaryPerWord / 2;
constexpr int kEntries = 16;

int32_t activation(const int8_t* q, int code) { return q[code % kPlanes * 4 + code / kPlanes]; }

void accumulate(const uint32_t* panel, int64_t words, const int8_t* q, int64_t, int, int32_t* dots, const uint32_t*) {
  int32_t sums[kPanelRows] = {};
  for (int64_t i = 0; i < words; ++i, panel += kPanelRows, q += kTernaryPerWord) {
    // What each pair of codes contributes: 64 rows share one table.
    int32_t table[kGroups][kEntries];
    for (int g = 0; g < kGroups; ++g) {
      const int32_t low = activation(q, 2 * g), high = activation(q, 2 * g + 1);
      for (int e = 0; e < kEntries; ++e) table[g][e] = (e & 3) * low + (e >> 2) * high;
    }
    for (int r = 0; r < kPanelRows; ++r) {
      for (int g = 0; g < kGroups; ++g) sums[r] += table[g][panel[r] >> (4 * g) & 15];
    }
  }
  std::copy_n(sums, kPanelRows, dots);
}

constexpr Int8Kernels kPortable{1, accumulate};

}  // namespace

const Int8Kernels& int8_kernels() {
#if defined(__x86_64__)
  if (path() == Path::kAvx512) return int8_dot_avx512;
  if (path() == Path::kAvx2) return int8_dot_avx2;
#endif
  return kPortable;
}

}  // namespace bitkernels::cpu
