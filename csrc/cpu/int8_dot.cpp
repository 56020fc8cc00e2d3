// Portable integer dot products, and the choice among instruction sets.
#include "int8_dot.h"

#include <algorithm>

#include "cpu_features.h"
#include "panel.h"

namespace bitkernels::cpu {
namespace {

void accumulate(const uint32_t* panel, int64_t words, const int8_t* q, int64_t, int, int32_t* dots, const uint32_t*) {
  int32_t sums[kPanelRows] = {};
  for (int64_t i = 0; i < words; ++i) {
    for (int j = 0; j < kPlanes; ++j) {
      for (int b = 0; b < 4; ++b) {
        const int32_t activation = q[16 * i + 4 * j + b];
        for (int r = 0; r < kPanelRows; ++r) {
          const uint32_t code = panel[i * kPanelRows + r] >> (8 * b + 2 * j) & 3;
          sums[r] += static_cast<int32_t>(code) * activation;
        }
      }
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
