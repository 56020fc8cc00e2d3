// How packed weights become operands of the tensor cores, and in which order the activations must then lie.
//
// A mask alone decodes: `word & mask` leaves one code in each half (or byte) of a register. Read as fp16,
// bit p of a half alone is the subnormal 2^(p - 24), exactly, for p < 10; so plane p holds the codes
// times 2^(p - 24), and the activations that meet it are multiplied by 2^(9 - p) when they are prepared.
// Every product is then code * activation * kProductScale, whatever the plane. Bits 10..15 of each half
// are shifted down first, one shift for all of them.
//
// A lane consumes whole words: lane t of a quad takes every fourth word of its row, and each register of
// the word meets the activations of the same columns, which are stored in that order. Sums do not care
// about the order of the columns, so no weight is ever moved between lanes.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace bitkernels::cuda {

// Rows are read in pieces of 16 words, four adjacent words to a lane: one 16-byte load. Word j of the
// four lanes makes unit j of the piece: what four lanes consume together, word by word.
constexpr int kWordsPerPiece = 16;
constexpr int kUnitsPerPiece = 4;

constexpr float kProductScale = 1.0f / 32768.0f;  // 2^(p - 24) * 2^(9 - p)

// The bits of a half that stay a subnormal when the others are masked away.
constexpr int kSubnormalBits = 10;

struct InWordOrder {
  static constexpr int unit(int word) { return word / kWordsPerPiece * kUnitsPerPiece + word % 4; }
  static constexpr int quad_lane(int word) { return word / 4 % 4; }
};

struct SignF16 : InWordOrder {
  using Accumulator = float;
  static constexpr bool kInteger = false;
  static constexpr int kPerWord = 32;
  static constexpr int kChunks = 4;  // 16-byte chunks of activations that meet one word
  static constexpr int kRuns = 2;    // elements of a register
  static constexpr int kStep = 2;    // weight = kStep * code - 1

  // Registers 0..15 of a word: codes i and i + 16.
  static __device__ uint32_t decode(uint32_t word, int i) {
    constexpr uint32_t kMask = 0x00010001;
    return i < kSubnormalBits ? word & kMask << i : word >> kSubnormalBits & kMask << (i - kSubnormalBits);
  }
  static constexpr int plane(int i) { return i % kSubnormalBits; }
};

struct TernaryF16 : InWordOrder {
  using Accumulator = float;
  static constexpr bool kInteger = false;
  static constexpr int kPerWord = 16;
  static constexpr int kChunks = 2;
  static constexpr int kRuns = 2;
  static constexpr int kStep = 1;

  // Registers 0..7 of a word: codes i and i + 8.
  static __device__ uint32_t decode(uint32_t word, int i) {
    constexpr uint32_t kMask = 0x00030003;
    return 2 * i < kSubnormalBits ? word & kMask << 2 * i : word >> kSubnormalBits & kMask << (2 * i - kSubnormalBits);
  }
  static constexpr int plane(int i) { return 2 * i % kSubnormalBits; }
};

struct TernaryI8 : InWordOrder {
  using Accumulator = int;
  static constexpr bool kInteger = true;
  static constexpr int kPerWord = 16;
  static constexpr int kChunks = 1;
  static constexpr int kRuns = 4;
  static constexpr int kStep = 1;

  // Registers 0..3 of a word: codes i, i + 4, i + 8, i + 12.
  static __device__ uint32_t decode(uint32_t word, int i) {
    constexpr uint32_t kMask = 0x03030303;
    return word >> 2 * i & kMask;
  }
  static constexpr int plane(int) { return 0; }
};

// Element e of run r of chunk q of a word lies in half (byte) `slot` of register `reg` of the chunk.
template <typename F>
struct ChunkOrder {
  static constexpr int first(int q, int r) { return r * (F::kPerWord / F::kRuns) + 4 * q; }
  static constexpr int reg(int, int e) { return e; }
  static constexpr int slot(int r, int) { return r; }
};

// The gradient dy of the backward matmuls, whose contraction runs over the rows of the weights: a "word"
// is 8 consecutive elements, one chunk.
template <int kStepOfWeights>
struct GradientF16 {
  using Accumulator = float;
  static constexpr bool kInteger = false;
  static constexpr int kPerWord = 8;
  static constexpr int kChunks = 1;
  static constexpr int kRuns = 2;
  static constexpr int kStep = kStepOfWeights;
  static constexpr int plane(int) { return 0; }
  static constexpr int unit(int word) { return word / 4; }
  static constexpr int quad_lane(int word) { return word % 4; }
};

template <int kStep>
struct ChunkOrder<GradientF16<kStep>> {
  static constexpr int first(int, int r) { return 4 * r; }
  static constexpr int reg(int r, int e) { return 2 * r + e / 2; }
  static constexpr int slot(int, int e) { return e % 2; }
};

}  // namespace bitkernels::cuda
