// pack_sign, unpack_sign, pack_ternary, unpack_ternary.
#include <algorithm>

#include "element.h"
#include "kernels.h"

namespace bitkernels::cpu {
namespace {

constexpr int64_t kGrainWords = 1024;

// Eight codes, one a byte and the first in the lowest, moved together by halving the gaps three times.
template <int kBits>
uint32_t gather(uint64_t codes) {
  codes = (codes | codes >> (8 - kBits)) & 0x00ff00ff00ff00ffull;
  codes = (codes | codes >> (16 - 2 * kBits)) & 0x0000ffff0000ffffull;
  return static_cast<uint32_t>(codes | codes >> (32 - 4 * kBits)) & ((1u << (8 * kBits)) - 1);
}

// Calls code(w[n, k]) for every weight and stores the codes, `padding` beyond K.
template <int kBits, typename T, typename Code>
void pack(const T* w, uint32_t* w_packed, int64_t N, int64_t K, uint8_t padding, Executor run, const Code& code) {
  constexpr int64_t kPerWord = 32 / kBits;
  const int64_t words = ceil_div(K, kPerWord);
  run(N * words, kGrainWords, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % words * kPerWord;
      const T* values = w + i / words * K + k;
      // Two steps, of which the compiler vectorises the first.
      uint8_t codes[kPerWord];
      if (k + kPerWord <= K) {
        for (int64_t j = 0; j < kPerWord; ++j) codes[j] = code(values[j]);
      } else {
        for (int64_t j = 0; j < kPerWord; ++j) codes[j] = k + j < K ? code(values[j]) : padding;
      }
      uint32_t word = 0;
      for (int64_t j = 0; j < kPerWord; j += 8) {
        uint64_t eight = 0;
        for (int64_t byte = 0; byte < 8; ++byte) eight |= static_cast<uint64_t>(codes[j + byte]) << (8 * byte);
        word |= gather<kBits>(eight) << (kBits * j);
      }
      w_packed[i] = word;
    }
  });
}

// Stores value(code) of every weight.
template <int kBits, typename T, typename Value>
void unpack(const uint32_t* w_packed, T* w, int64_t N, int64_t K, Executor run, const Value& value) {
  constexpr int64_t kPerWord = 32 / kBits;
  const int64_t words = ceil_div(K, kPerWord);
  run(N * words, kGrainWords, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % words * kPerWord;
      const int64_t count = std::min(kPerWord, K - k);
      T* values = w + i / words * K + k;
      for (int64_t j = 0; j < count; ++j) {
        from_float(value((w_packed[i] >> (kBits * j)) & ((1u << kBits) - 1)), values[j]);
      }
    }
  });
}

}  // namespace

void pack_sign(const void* w, DType dtype, uint32_t* w_packed, int64_t N, int64_t K, Executor run) {
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    pack<1>(static_cast<const T*>(w), w_packed, N, K, 0, run, [](T v) -> uint8_t { return to_float(v) >= 0; });
  });
}

void unpack_sign(const uint32_t* w_packed, void* w, DType dtype, int64_t N, int64_t K, Executor run) {
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    unpack<1>(w_packed, static_cast<T*>(w), N, K, run, [](uint32_t bit) { return bit ? 1.0f : -1.0f; });
  });
}

void pack_ternary(const void* w, const void* scale, DType dtype, uint32_t* w_packed, int64_t N, int64_t K,
                  Executor run) {
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    using Wide = decltype(to_float(element));
    const Wide factor = scale ? 1 / *static_cast<const Wide*>(scale) : 1;
    // Rounding half to even and clipping to [-1, 1] leaves two thresholds: 0.5 itself rounds to zero.
    pack<2>(static_cast<const T*>(w), w_packed, N, K, 1, run, [factor](T v) -> uint8_t {
      const Wide scaled = to_float(v) * factor;
      return 1 + (scaled > Wide(0.5)) - (scaled < Wide(-0.5));
    });
  });
}

void unpack_ternary(const uint32_t* w_packed, void* w, DType dtype, int64_t N, int64_t K, Executor run) {
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    unpack<2>(w_packed, static_cast<T*>(w), N, K, run, [](uint32_t code) { return static_cast<float>(code) - 1.0f; });
  });
}

}  // namespace bitkernels::cpu
