// Few tokens: every weight is read once, straight into registers, and all of them are requested at once.
//
// A block takes 16 kTiles rows of the weights; its warps take the pieces of K in turn and add up in shared
// memory, in a fixed order. Weights do not depend on the kernel that prepares the activations, so the
// first loads are under way before this kernel waits for it. Activations come from the L1 cache, in the
// order of the fragments.
#pragma once

#include "epilogue.cuh"
#include "weights.cuh"

namespace bitkernels::cuda {

constexpr int kSkinnyMostWarps = 8;

// Partial sums [row of activations][row of weights], padded so that a warp's fragments hit 32 banks.
constexpr int skinny_pitch(int tiles) { return kMmaRows * tiles + 4; }

template <typename F, int kGroups, int kTiles>
__global__ void __launch_bounds__(32 * kSkinnyMostWarps, kGroups == 1   ? 4
                                                         : kGroups == 2 ? 3
                                                                        : 2)
    skinny_kernel(Weights w, Prepared x, Epilogue e, int64_t M) {
  using Accumulator = typename F::Accumulator;
  constexpr int kPitch = skinny_pitch(kTiles);
  constexpr int kTokens = kGroups * kRowsPerGroup;
  extern __shared__ uint4 shared[];

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int64_t first_row = int64_t(blockIdx.x) * kMmaRows * kTiles;

  // Within a block, offsets fit 32 bits.
  const uint32_t* block_words = w.packed + first_row * w.words + 4 * t;
  const int last_row = static_cast<int>(min(w.rows - first_row, int64_t(kMmaRows * kTiles))) - 1;
  const int words_of_row = static_cast<int>(w.words);
  const int pieces = static_cast<int>(x.units / kUnitsPerPiece);
  const auto fetch = [&](int piece, uint4(&v)[kTiles][2]) {
    if (piece >= pieces) return;
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t* row = block_words + min(r * kMmaRows + h * 8 + g, last_row) * words_of_row;
        v[r][h] = load_words(w, row + piece * kWordsPerPiece, words_of_row - piece * kWordsPerPiece - 4 * t);
      }
    }
  };

  Accumulator sums[kTiles][kGroups][4] = {};
  const auto consume = [&](int piece, const uint4(&v)[kTiles][2]) {
#pragma unroll
    for (int j = 0; j < kUnitsPerPiece; ++j) {
      const uint4* unit = x.chunks + (int64_t(piece) * kUnitsPerPiece + j) * x.groups * (F::kChunks * 32) + lane;
#pragma unroll
      for (int q = 0; q < F::kChunks; ++q) {
        uint4 b[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          b[i] = i * kRowsPerGroup + g < x.rows ? unit[(i * F::kChunks + q) * 32] : uint4{};
        }
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
          const uint32_t upper = component(v[r][0], j);
          const uint32_t lower = component(v[r][1], j);
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            const int reg = 4 * q + 2 * step;
            const uint32_t a[4] = {F::decode(upper, reg), F::decode(lower, reg), F::decode(upper, reg + 1),
                                   F::decode(lower, reg + 1)};
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
              mma(sums[r][i], a, component(b[i], 2 * step), component(b[i], 2 * step + 1));
            }
          }
        }
      }
    }
  };

  uint4 even[kTiles][2];
  uint4 odd[kTiles][2];
  fetch(warp, even);
  fetch(warp + warps, odd);
  wait_for_previous_kernel();
  for (int piece = warp; piece < pieces; piece += 2 * warps) {
    consume(piece, even);
    fetch(piece + 2 * warps, even);
    if (piece + warps < pieces) {
      consume(piece + warps, odd);
      fetch(piece + 3 * warps, odd);
    }
  }

  Accumulator* partial = reinterpret_cast<Accumulator*>(shared);  // [warps][kTokens][kPitch]
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = i * kRowsPerGroup + 2 * t + c % 2;
        partial[(warp * kTokens + token) * kPitch + r * kMmaRows + c / 2 * 8 + g] = sums[r][i][c];
      }
    }
  }
  __syncthreads();

  const int limbs = static_cast<int>(x.rows / M);
  for (int i = threadIdx.x; i < M * kMmaRows * kTiles; i += blockDim.x) {
    const int n = i % (kMmaRows * kTiles);
    const int m = i / (kMmaRows * kTiles);
    if (first_row + n >= w.rows) continue;
    Accumulator total[2] = {};
#pragma unroll
    for (int limb = 0; limb < 2; ++limb) {
      for (int v = 0; v < warps && limb < limbs; ++v) {
        total[limb] += partial[(v * kTokens + m * limbs + limb) * kPitch + n];
      }
    }
    const float y = finish(e, x.tokens[m], column_of(e, first_row + n), join_limbs(total[0], total[1]));
    store(e.out, e.dtype, m * e.columns + first_row + n, y);
  }
}

template <typename F, int kGroups, int kTiles>
void run_skinny(const Weights& w, const Prepared& x, const Epilogue& e, int64_t M, cudaStream_t stream) {
  const int64_t pieces = max(x.units / kUnitsPerPiece, int64_t(1));  // K = 0 takes a warp, too
  const int64_t rounds = ceil_div(pieces, kSkinnyMostWarps);
  const int warps = static_cast<int>(ceil_div(pieces, rounds));
  const size_t shared = sizeof(float) * warps * kGroups * kRowsPerGroup * skinny_pitch(kTiles);
  const Grid grid{dim3(static_cast<unsigned>(ceil_div(w.rows, kMmaRows * kTiles))), 32 * warps, shared, true};
  launch(skinny_kernel<F, kGroups, kTiles>, grid, stream, w, x, e, M);
}

}  // namespace bitkernels::cuda
