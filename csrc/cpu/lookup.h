// Matmuls with packed weights by table lookup, the core of every path of packed_linear and ternary_linear.
//
// A group of g bits of a weight word stands for a few neighbouring weights (4 signs or 2 ternary codes
// where g = 4), so its contribution to a dot product takes one of 2^g values. They are tabulated once per
// token and group; a lookup and an addition then replace one multiplication per weight.
#pragma once

#include <string>

#include "kernels.h"
#include "panel.h"

namespace bitkernels::cpu {

enum class Format { kSign, kTernary };

constexpr int64_t per_word(Format format) { return format == Format::kSign ? kSignsPerWord : kTernaryPerWord; }

// What differs between formats and instruction sets. T is the type of activations and results.
template <typename T>
struct LookupKernels {
  const char* name;     // as explain() tells it
  int64_t table_bytes;  // of one weight word and token
  int64_t sum_bytes;    // of the partial sums of a panel and token; all zeros to begin with
  // Tables of x[words * weights per word], zero beyond K. Returns what finish() is to multiply by.
  T (*tabulate)(const T* x, int64_t words, void* tables);
  LoadChunk load;
  // Adds a chunk of `words` words to the sums of each token; the tables of a token are table_stride bytes apart.
  void (*accumulate)(const uint32_t* chunk, int words, const void* tables, int64_t table_stride, int64_t tokens,
                     void* sums);
  // dots[kPanelRows] of one token.
  void (*finish)(const void* sums, T factor, T* dots);
};

// Defined in lookup_<path>.cpp, to be called on machines with that instruction set alone.
const LookupKernels<float>& lookup_avx2(Format);
// For M tokens of type dtype and rows of no more than kLookupAvx512MaxWords words.
const LookupKernels<float>& lookup_avx512(Format, DType dtype, int64_t M);
constexpr int64_t kLookupAvx512MaxWords = 1 << 14;

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
  const void* x;      // [M, K] dtype, or T where wide_x
  const uint32_t* w;  // [N, words]
  void* y;            // [M, N] dtype, or T where added
  DType dtype;
  Format format;
  Scale<T> in_scale, in_shift, out_scale, out_shift;
  const T* bias;  // [N] or null
  int64_t M, N, K;
  // Where not null: reductions over the tokens, by blocks of lookup_block_tokens(),
  //   left_dots[b, n] = sum_m left[m, n] * (sum_k w[n, k] in_scale[k] x[m, k]),
  //   left_sums[b, n] = sum_m left[m, n] * (sum_k in_shift[k] x[m, k]).
  const void* left;  // [M, N] dtype
  T* left_dots;      // [ceil(M / block), N]
  T* left_sums;      // as left_dots
  // Where not null, x[m, k] above stands for x[m, k] / sqrt(mean_k(x[m, k]^2) + eps) * norm_weight[k].
  const T* norm_weight = nullptr;  // [K]
  double eps = 0;
  bool wide_x = false;
  bool added = false;              // to what y holds
  const ConvStep* conv = nullptr;  // a step of it follows on y's columns, if any
};

// Tokens whose tables are held at once; fixed by the sizes alone, so that results do not depend on threads.
int64_t lookup_block_tokens(Format format, int64_t M, int64_t K);

template <typename T>
void lookup_matmul(const LookupMatmul<T>&, Executor);

// Which kernels and blocks lookup_matmul takes.
template <typename T>
std::string explain_lookup(const LookupMatmul<T>&);

// w_packed [N, ceil(K / per_word)] -> transposed [K, ceil(N / per_word)], zero bits beyond N.
void transpose_packed(Format format, const uint32_t* w_packed, uint32_t* transposed, int64_t N, int64_t K, Executor);

}  // namespace bitkernels::cpu
