// Portable integer dot products, and the choice among instruction sets.
#include "int8_dot.h"

#include "cpu_features.h"

namespace bitkernels::cpu {
namespace {

constexpr int kGroups = kTernaryPerWord / 2;
constexpr int kEntries = 16;

int32_t activation(const int8_t* q, int code) { return q[code % kPlanes * 4 + code / kPlanes]; }

void accumulate(const uint32_t* chunk, int words, const int8_t* q, int64_t stride, int64_t tokens, int32_t* dots) {
  for (int64_t t = 0; t < tokens; ++t, dots += kPanelRows) {
    for (int i = 0; i < words; ++i) {
      // What each pair of codes contributes: 64 rows share one table.
      const int8_t* activations = q + t * stride + i * kTernaryPerWord;
      int32_t table[kGroups][kEntries];
      for (int g = 0; g < kGroups; ++g) {
        const int32_t low = activation(activations, 2 * g), high = activation(activations, 2 * g + 1);
        for (int e = 0; e < kEntries; ++e) table[g][e] = (e & 3) * low + (e >> 2) * high;
      }
      for (int r = 0; r < kPanelRows; ++r) {
        for (int g = 0; g < kGroups; ++g) dots[r] += table[g][chunk[i * kPanelRows + r] >> (4 * g) & 15];
      }
    }
  }
}

constexpr Int8Kernels kPortable{transpose_chunk_portable, accumulate, "portable"};

}  // namespace

const Int8Kernels& int8_kernels() {
#if defined(__x86_64__)
  if (path() == Path::kAvx512) return int8_dot_avx512;
  if (path() == Path::kAvx2) return int8_dot_avx2;
#endif
  return kPortable;
}

}  // namespace bitkernels::cpu
