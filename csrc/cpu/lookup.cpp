// The driver of the lookup matmul, its portable kernels, and the choice among instruction sets.
#include "lookup.h"

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "buffer.h"
#include "cpu_features.h"
#include "element.h"
#include "lookup_rows.h"

namespace bitkernels::cpu {
namespace {

constexpr int64_t kMaxBlockTokens = 8;
constexpr int64_t kGrainProducts = 1 << 17;  // products worth a thread

// What one thread needs: the tables of a block of tokens, and a chunk of a panel with its dot products.
template <typename T>
class Worker {
 public:
  Worker(const LookupMatmul<T>& a, const LookupKernels<T>& kernels)
      : a_(a),
        kernels_(kernels),
        rows_(row_kernels<T>()),
        words_(ceil_div(a.K, per_word(a.format))),
        block_(lookup_block_tokens(a.format, a.M, a.K)),
        panels_(ceil_div(a.N, kPanelRows)),
        table_stride_(words_ * kernels.table_bytes),
        row_(words_ * per_word(a.format)),
        tables_(block_ * table_stride_),
        chunk_(kMaxChunkWords),
        sums_(block_ * kernels.sum_bytes),
        dots_(block_ * kPanelRows) {}

  void operator()(int64_t begin, int64_t end) {
    int64_t tabulated = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / panels_;
      if (block != tabulated) tabulate(block);
      tabulated = block;
      multiply(block, task % panels_ * kPanelRows);
    }
  }

 private:
  int64_t tokens_of(int64_t block) const { return std::min(block_, a_.M - block * block_); }

  void tabulate(int64_t block) {
    std::fill(row_.data + a_.K, row_.data + words_ * per_word(a_.format), T(0));
    for (int64_t t = 0; t < tokens_of(block); ++t) {
      const int64_t m = block * block_ + t;
      shifts_[t] = rows_.scale(a_, m, row_.data);
      factors_[t] = kernels_.tabulate(row_.data, words_, tables_.data + t * table_stride_);
    }
  }

  void multiply(int64_t block, int64_t n0) {
    const int64_t tokens = tokens_of(block), m0 = block * block_;
    const int64_t columns = std::min<int64_t>(kPanelRows, a_.N - n0);
    for (int64_t t = 0; t < tokens; ++t) rows_.expect(a_, m0 + t, n0, columns);
    std::fill_n(sums_.data, tokens * kernels_.sum_bytes, std::byte{0});
    for_each_chunk(a_.w, a_.N, words_, n0, [&](const uint32_t* const* rows, int64_t word, int count) {
      kernels_.load(rows, word, count, chunk_.data);
      kernels_.accumulate(chunk_.data, count, tables_.data + word * kernels_.table_bytes, table_stride_, tokens,
                          sums_.data);
    });
    for (int64_t t = 0; t < tokens; ++t) {
      kernels_.finish(sums_.data + t * kernels_.sum_bytes, factors_[t], dots_.data + t * kPanelRows);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      rows_.store(a_, m0 + t, n0, columns, dots_.data + t * kPanelRows, shifts_[t]);
    }
    if (!a_.left) return;
    visit(a_.dtype, [&](auto element) {
      using X = decltype(element);
      reduce(static_cast<const X*>(a_.left) + m0 * a_.N + n0, block * a_.N + n0, tokens, columns);
    });
  }

  template <typename X>
  void reduce(const X* left, int64_t out, int64_t tokens, int64_t columns) {
    T by_dots[kPanelRows] = {}, by_sums[kPanelRows] = {};
    for (int64_t t = 0; t < tokens; ++t) {
      const T* dots = dots_.data + t * kPanelRows;
      for (int64_t i = 0; i < columns; ++i) {
        const T v = to_float(left[t * a_.N + i]);
        by_dots[i] += v * dots[i];
        by_sums[i] += v * shifts_[t];
      }
    }
    std::copy_n(by_dots, columns, a_.left_dots + out);
    std::copy_n(by_sums, columns, a_.left_sums + out);
  }

  const LookupMatmul<T>& a_;
  const LookupKernels<T>& kernels_;
  const RowKernels<T>& rows_;
  const int64_t words_, block_, panels_, table_stride_;
  Buffer<T> row_;
  Buffer<std::byte> tables_;
  Buffer<uint32_t> chunk_;
  Buffer<std::byte> sums_;
  Buffer<T> dots_;
  T shifts_[kMaxBlockTokens];   // sum of in_shift x
  T factors_[kMaxBlockTokens];  // of the sums of lookups
};

// Portable kernels: groups of 4 bits, 8 sums in flight.
constexpr int kRowBlock = 8;
constexpr int kGroupBits = 4;
constexpr int kGroups = 32 / kGroupBits;
constexpr int kEntries = 1 << kGroupBits;

// Both formats tabulate a group as two halves of two bits each.
template <Format kFormat, typename T>
T tabulate(const T* x, int64_t words, void* out) {
  T* tables = static_cast<T*>(out);
  for (int64_t group = 0; group < words * kGroups; ++group) {
    T low[4], high[4];
    for (int i = 0; i < 4; ++i) {
      if constexpr (kFormat == Format::kSign) {
        const T s0 = i & 1 ? 1 : -1, s1 = i & 2 ? 1 : -1;
        low[i] = s0 * x[0] + s1 * x[1];
        high[i] = s0 * x[2] + s1 * x[3];
      } else {
        low[i] = T(i - 1) * x[0];
        high[i] = T(i - 1) * x[1];
      }
    }
    for (int i = 0; i < kEntries; ++i) tables[i] = low[i & 3] + high[i >> 2];
    x += kFormat == Format::kSign ? 4 : 2;
    tables += kEntries;
  }
  return 1;
}

template <typename T>
void accumulate(const uint32_t* chunk, int words, const void* tables, int64_t stride, int64_t tokens, void* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* of_token = static_cast<const T*>(tables) + t * (stride / int64_t{sizeof(T)});
    T* dots = static_cast<T*>(out) + t * kPanelRows;
    for (int row = 0; row < kPanelRows; row += kRowBlock) {
      T sums[kRowBlock];
      std::copy_n(dots + row, kRowBlock, sums);
      for (int i = 0; i < words; ++i) {
        const T* table = of_token + i * kGroups * kEntries;
        for (int r = 0; r < kRowBlock; ++r) {
          const uint32_t word = chunk[i * kPanelRows + row + r];
          for (int g = 0; g < kGroups; ++g) sums[r] += table[g * kEntries + (word >> (kGroupBits * g)) % kEntries];
        }
      }
      std::copy_n(sums, kRowBlock, dots + row);
    }
  }
}

template <typename T>
void finish(const void* sums, T, T* dots) {
  std::copy_n(static_cast<const T*>(sums), kPanelRows, dots);
}

template <Format kFormat, typename T>
constexpr LookupKernels<T> kPortable{
    .name = "portable",
    .table_bytes = kGroups * kEntries * sizeof(T),
    .sum_bytes = kPanelRows * sizeof(T),
    .tabulate = tabulate<kFormat, T>,
    .load = transpose_chunk_portable,
    .accumulate = accumulate<T>,
    .finish = finish<T>,
};

template <typename T>
const LookupKernels<T>& kernels_for(const LookupMatmul<T>& a) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>) {
    const bool short_rows = ceil_div(a.K, per_word(a.format)) <= kLookupAvx512MaxWords;
    if (path() == Path::kAvx512 && short_rows) return lookup_avx512(a.format, a.dtype, a.M);
    if (path() >= Path::kAvx2) return lookup_avx2(a.format);
  }
#endif
  return a.format == Format::kSign ? kPortable<Format::kSign, T> : kPortable<Format::kTernary, T>;
}

// Transposes blocks of kPerWord x kPerWord codes in registers.
template <int kBits>
void transpose_block(uint32_t* rows) {
  constexpr int kPerWord = 32 / kBits;
  uint32_t mask = 0xffffffffu;
  for (int span = kPerWord / 2; span > 0; span /= 2) {
    const int shift = span * kBits;
    mask ^= mask << shift;  // the lower half of every pair of spans
    for (int i = 0; i < kPerWord; ++i) {
      if (i & span) continue;
      const uint32_t swap = ((rows[i] >> shift) ^ rows[i + span]) & mask;
      rows[i] ^= swap << shift;
      rows[i + span] ^= swap;
    }
  }
}

template <int kBits>
void transpose_codes(const uint32_t* w, uint32_t* out, int64_t N, int64_t K, Executor run) {
  constexpr int64_t kPerWord = 32 / kBits;
  const int64_t words = ceil_div(K, kPerWord), out_words = ceil_div(N, kPerWord);
  run(out_words, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n0 = i * kPerWord, count_n = std::min(kPerWord, N - n0);
      for (int64_t j = 0; j < words; ++j) {
        uint32_t block[kPerWord] = {};
        for (int64_t r = 0; r < count_n; ++r) block[r] = w[(n0 + r) * words + j];
        transpose_block<kBits>(block);
        const int64_t k0 = j * kPerWord, count_k = std::min(kPerWord, K - k0);
        for (int64_t r = 0; r < count_k; ++r) out[(k0 + r) * out_words + i] = block[r];
      }
    }
  });
}

}  // namespace

int64_t lookup_block_tokens(Format format, int64_t M, int64_t K) {
  // At most a megabyte of tables, about what a core's own cache holds; all blocks about equal.
  constexpr int64_t kTableFloats = 1 << 18;
  const int64_t words = std::max<int64_t>(1, ceil_div(K, per_word(format)));
  const int64_t most = std::clamp<int64_t>(kTableFloats / (words * kGroups * kEntries), 4, kMaxBlockTokens);
  return std::max<int64_t>(1, ceil_div(M, std::max<int64_t>(1, ceil_div(M, most))));
}

template <typename T>
void lookup_matmul(const LookupMatmul<T>& a, Executor run) {
  if (a.M == 0 || a.N == 0) return;
  const LookupKernels<T>& kernels = kernels_for(a);
  const int64_t block = lookup_block_tokens(a.format, a.M, a.K);
  const int64_t products = block * kPanelRows * std::max<int64_t>(a.K, 1);
  run(ceil_div(a.M, block) * ceil_div(a.N, kPanelRows), ceil_div(kGrainProducts, products),
      [&](int64_t begin, int64_t end) { Worker<T>(a, kernels)(begin, end); });
}

template <typename T>
std::string explain_lookup(const LookupMatmul<T>& a) {
  return std::string("lookup (") + kernels_for(a).name + "): a table of sums for each group of weights, blocks of " +
         std::to_string(lookup_block_tokens(a.format, a.M, a.K)) + " tokens times " + std::to_string(kPanelRows) +
         " rows of the weights";
}

template std::string explain_lookup(const LookupMatmul<float>&);
template std::string explain_lookup(const LookupMatmul<double>&);
template void lookup_matmul(const LookupMatmul<float>&, Executor);
template void lookup_matmul(const LookupMatmul<double>&, Executor);

void transpose_packed(Format format, const uint32_t* w_packed, uint32_t* transposed, int64_t N, int64_t K,
                      Executor run) {
  if (format == Format::kSign) {
    transpose_codes<1>(w_packed, transposed, N, K, run);
  } else {
    transpose_codes<2>(w_packed, transposed, N, K, run);
  }
}

}  // namespace bitkernels::cpu
