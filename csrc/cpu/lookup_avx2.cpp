// Lookup kernels for AVX2: 8 rows in a register. Signs go in groups of 3 bits, for vpermps takes 8 table
// entries by 3 index bits; ternary codes go one by one through vpermilps, which takes 4 by 2.
#include <immintrin.h>

#include "lookup.h"

namespace bitkernels::cpu {
namespace {

constexpr int kLanes = 8;
constexpr int kVectors = 4;  // registers of rows, half a panel
constexpr int kRows = kVectors * kLanes;

struct Sign {
  static constexpr int kBits = 3;
  static constexpr int kGroups = 11;  // the last group has two bits
  static constexpr int kEntries = 8;
  static __m256 load(const float* table) { return _mm256_load_ps(table); }
  static __m256 look_up(__m256 table, __m256i index) { return _mm256_permutevar8x32_ps(table, index); }
};

struct Ternary {
  static constexpr int kBits = 2;
  static constexpr int kGroups = 16;
  static constexpr int kEntries = 4;
  static __m256 load(const float* table) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(table)); }
  static __m256 look_up(__m256 table, __m256i index) { return _mm256_permutevar_ps(table, index); }
};

float tabulate_sign(const float* x, int64_t words, void* out) {
  float* tables = static_cast<float*>(out);
  // Lane i holds the sign that bit j of i stands for.
  const __m256 s0 = _mm256_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1), s1 = _mm256_setr_ps(-1, -1, 1, 1, -1, -1, 1, 1);
  const __m256 s2 = _mm256_setr_ps(-1, -1, -1, -1, 1, 1, 1, 1);
  for (int64_t i = 0; i < words; ++i) {
    for (int g = 0; g < Sign::kGroups; ++g, tables += kLanes) {
      const float* values = x + 32 * i + 3 * g;
      const __m256 third = g < 10 ? _mm256_mul_ps(s2, _mm256_set1_ps(values[2])) : _mm256_setzero_ps();
      // Products with signs are exact, so each fused operation rounds as an addition does.
      const __m256 second = _mm256_fmadd_ps(s1, _mm256_set1_ps(values[1]), third);
      _mm256_store_ps(tables, _mm256_fmadd_ps(s0, _mm256_set1_ps(values[0]), second));
    }
  }
  return 1;
}

float tabulate_ternary(const float* x, int64_t words, void* tables) {
  const __m128 weights = _mm_setr_ps(-1, 0, 1, 2);
  for (int64_t k = 0; k < words * kTernaryPerWord; ++k) {
    _mm_store_ps(static_cast<float*>(tables) + 4 * k, _mm_mul_ps(weights, _mm_set1_ps(x[k])));
  }
  return 1;
}

template <typename Code, int kTokens>
void accumulate_tokens(const uint32_t* chunk, int words, const float* tables, int64_t stride, float* dots) {
  __m256 sums[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm256_load_ps(dots + t * kPanelRows + v * kLanes);
  }
  for (int i = 0; i < words; ++i, chunk += kPanelRows, tables += Code::kGroups * Code::kEntries) {
    __m256i w[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      w[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(chunk + v * kLanes));
    }
#pragma GCC unroll 16
    for (int g = 0; g < Code::kGroups; ++g) {
      for (int t = 0; t < kTokens; ++t) {
        const __m256 table = Code::load(tables + t * stride + g * Code::kEntries);
        for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm256_add_ps(sums[t][v], Code::look_up(table, w[v]));
      }
      for (int v = 0; v < kVectors; ++v) w[v] = _mm256_srli_epi32(w[v], Code::kBits);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) _mm256_store_ps(dots + t * kPanelRows + v * kLanes, sums[t][v]);
  }
}

template <typename Code>
void accumulate(const uint32_t* chunk, int words, const void* tables, int64_t stride, int64_t tokens, void* sums) {
  for (int64_t t = 0; t < tokens; t += 2) {
    const auto kernel = t + 1 < tokens ? accumulate_tokens<Code, 2> : accumulate_tokens<Code, 1>;
    const float* of_token = static_cast<const float*>(tables) + t * (stride / int64_t{sizeof(float)});
    float* dots = static_cast<float*>(sums) + t * kPanelRows;
    for (int r = 0; r < kPanelRows; r += kRows) {
      kernel(chunk + r, words, of_token, stride / int64_t{sizeof(float)}, dots + r);
    }
  }
}

void finish(const void* sums, float, float* dots) { __builtin_memcpy(dots, sums, kPanelRows * sizeof(float)); }

template <typename Code>
constexpr LookupKernels<float> kernels(float (*tabulate)(const float*, int64_t, void*)) {
  return {
      .name = "avx2",
      .table_bytes = Code::kGroups * Code::kEntries * sizeof(float),
      .sum_bytes = kPanelRows * sizeof(float),
      .tabulate = tabulate,
      .load = transpose_chunk_avx2,
      .accumulate = accumulate<Code>,
      .finish = finish,
  };
}

constexpr LookupKernels<float> kSign = kernels<Sign>(tabulate_sign);
constexpr LookupKernels<float> kTernary = kernels<Ternary>(tabulate_ternary);

}  // namespace

const LookupKernels<float>& lookup_avx2(Format format) { return format == Format::kSign ? kSign : kTernary; }

}  // namespace bitkernels::cpu
