// Sizes of the scan's memory, the same for every instruction set. Counted in elements of acc.
#pragma once

#include "../mixer_kernels.h"

namespace bitkernels::cpu {
namespace {  // each instruction set compiles its own

constexpr int kChunk = 32;
constexpr int64_t kBunch = 4;     // heads that walk over the chunks together
constexpr int64_t kPadding = 16;  // a multiple of the lanes of every vector

struct ScanLayout {
  int64_t N, G, padded;  // padded: P rounded up
  int64_t tile;          // B^T, C^T and C B^T of a chunk and group

  explicit ScanLayout(const SsdScan& p)
      : N(p.N), G(p.G), padded(ceil_div(p.P, kPadding) * kPadding), tile((2 * p.N + kChunk) * kChunk) {}

  int64_t tiles(int64_t chunk, int64_t group) const { return (chunk * G + group) * tile; }
  int64_t shared() const { return kChunk * (2 * padded + kChunk + 2 * N); }
  int64_t shared_backward() const { return shared() + kChunk * (4 * padded + 3 * kChunk + N); }
  int64_t forward_scratch() const { return shared() + kBunch * (N + 1) * padded; }
  // Every head of a bunch keeps the states before its chunks.
  int64_t backward_scratch(int64_t chunks) const {
    return shared_backward() + kBunch * (N + 2) * padded + kBunch * chunks * N * padded;
  }
};

// The heads of a group are summed into dB and dC block by block, and the blocks at the end. The
// number of blocks follows from the shape alone, so the result does not depend on the threads.
struct HeadBlocks {
  int64_t heads, count;  // of a block; blocks of a group

  explicit HeadBlocks(const SsdScan& p) {
    constexpr int64_t kItems = 16;  // to share among threads; each holds a dB and a dC
    const int64_t group_heads = p.H / p.G;
    const int64_t wanted = ceil_div(p.S * p.H, kItems);
    heads = wanted < group_heads ? wanted : group_heads;
    if (heads < 1) heads = 1;
    count = ceil_div(group_heads, heads);
  }
};

// Where the partial sums of the backward lie in its workspace, after the forward's.
struct BackwardLayout {
  int64_t block;  // of dB^T or dC^T, one block of heads
  int64_t dB, dC, dA, ddt_bias, dD, total;

  explicit BackwardLayout(const SsdScanBackward& g) {
    const SsdScan& p = g.forward;
    const Sequence& last = p.sequences[p.S - 1];
    const int64_t chunks = last.first_chunk + ceil_div(last.length, kChunk);
    const int64_t blocks = HeadBlocks(p).count;
    block = chunks * p.G * p.N * kChunk;
    dB = chunks * p.G * ScanLayout(p).tile;
    dC = dB + blocks * block;
    dA = dC + blocks * block;
    ddt_bias = dA + p.S * p.H;
    dD = ddt_bias + p.S * p.H;
    total = dD + p.S * p.H * p.P;
  }
};

}  // namespace
}  // namespace bitkernels::cpu
