// Matmuls with packed weights by table lookup, the core of every path of packed_linear and ternary_linear.
//
// A group of g bits of a weight word stands for a few neighbouring weights (4 signs or 2 ternary codes
// where g = 4), so its contribution to a dot product takes one of 2^g values. They are tabulated once per
// token and group; a lookup and an addition then replace one multiplication per weight.
#pragma once

#include "kernels.h"

namespace bitkernels::cpu {

// What differs between formats and instruction sets.
template <typename T>
struct LookupKernels {
  int table_width;   // values tabulated per weight word
  int block_tokens;  // tokens accumulate() handles at once
  // tables[words * table_width] from x[words * weights per word], zero beyond K.
  void (*tabulate)(const T* x, int64_t words, T* tables);
  // dots[t * kPanelRows + r] = dot product of row r and token t < tokens <= block_tokens; the tables of a
  // token are table_stride apart. `next` points at the weights to come, which are fetched meanwhile.
  void (*accumulate)(const uint32_t* panel, int64_t words, const T* tables, int64_t table_stride, int tokens, T* dots,
                     const uint32_t* next);
};

enum class Format { kSign, kTernary };

// Defined in lookup_<path>.cpp, to be called on machines with that instruction set alone.
const LookupKernels<float>& lookup_avx2(Format);
const LookupKernels<float>& lookup_avx512(Format);

constexpr int64_t per_word(Format format) { return format == Format::kSign ? kSignsPerWord : kTernaryPerWord; }

// A vector of scales, or one value for all indices where stride is 0.
template <typename T>
struct Scale {
  const T* values;
  int64_t stride;
  T operator[](int64_t i) const { return values[i * stride]; }
};

// y[m, n] = out_scale[n] * sum_k w[n, k] in_scale[k] x[m, k] + out_shift[n] * sum_k in_shift[k] x[m, k] + bias[n]
template <typename T>
struct LookupMatmul {
  const void* x;      // [M, K] dtype
  const uint32_t* w;  // [N, words]
  void* y;            // [M, N] dtype
  DType dtype;
  Format format;
  Scale<T> in_scale, in_shift, out_scale, out_shift;
  const T* bias;  // [N] or null
  int64_t M, N, K;
  // Where not null: reductions over the tokens, by blocks of block_tokens(),
  //   left_dots[b, n] = sum_m left[m, n] * (sum_k w[n, k] in_scale[k] x[m, k]),
  //   left_sums[b, n] = sum_m left[m, n] * (sum_k in_shift[k] x[m, k]).
  const void* left;  // [M, N] dtype
  T* left_dots;      // [ceil(M / block), N]
  T* left_sums;      // as left_dots
};

// Tokens whose tables are held at once; fixed by the sizes alone, so that results do not depend on threads.
int64_t lookup_block_tokens(Format format, int64_t K);

template <typename T>
void lookup_matmul(const LookupMatmul<T>&, Executor);

// w_packed [N, ceil(K / per_word)] -> transposed [K, ceil(N / per_word)], zero bits beyond N.
void transpose_packed(Format format, const uint32_t* w_packed, uint32_t* transposed, int64_t N, int64_t K, Executor);

}  // namespace bitkernels::cpu
