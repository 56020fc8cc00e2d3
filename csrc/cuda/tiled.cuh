// Many tokens: a block makes 128 rows of the weights times 64 or 128 tokens.
//
// Prepared activations stream through shared memory; weights go from global memory (L2: they are small)
// into the registers of the warps that own their rows, so a code is decoded once for 64 tokens. Where
// there are too few tiles for the card, blocks split K, and a second kernel adds the parts in order.
#pragma once

#include "epilogue.cuh"
#include "weights.cuh"

namespace bitkernels::cuda {

// Warps that split the rows of the tile, and warps that split its tokens; each does kTiles x 16 rows times
// 64 tokens.
template <int kRowWarps_, int kTokenWarps_>
struct TileShape {
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kTokenWarps = kTokenWarps_;
  static constexpr int kRows = 128;
  static constexpr int kWarps = kRowWarps * kTokenWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTiles = kRows / kRowWarps / kMmaRows;
  static constexpr int kGroups = 8;  // of a warp
  static constexpr int kBlockGroups = kGroups * kTokenWarps;
  static constexpr int kTokens = kBlockGroups * kRowsPerGroup;
  // A stage is some 2000 cycles of work: enough to hide the next one's way from L2 behind.
  static constexpr int kStages = 2;
  // A stage holds four chunks of activations for each lane and group: one word of signs, four of int8.
  static constexpr int kChunksPerStage = 4;
  static constexpr int kStageVectors = kChunksPerStage * kBlockGroups * 32;
  // The output of a warp, [tokens][rows], passes through the same memory on its way out.
  static constexpr int kOutPitch = kTiles * kMmaRows + 4;
  static constexpr int kWarpOut = kGroups * kRowsPerGroup * kOutPitch;
  static constexpr size_t kStageBytes = sizeof(uint4) * kStages * kStageVectors;
  static constexpr size_t kOutBytes = sizeof(float) * kWarps * kWarpOut;
  static constexpr size_t kShared = kStageBytes > kOutBytes ? kStageBytes : kOutBytes;
};

using WideTile = TileShape<2, 2>;    // 128 tokens
using NarrowTile = TileShape<4, 1>;  // 64 tokens

// A stage is units [stage * kUnits, (stage + 1) * kUnits) of the block's groups of tokens.
template <typename Shape, int kChunks>
__device__ void fetch_stage(const Prepared& x, int64_t stage, int64_t first_group, uint4* shared) {
  constexpr int kUnits = Shape::kChunksPerStage / kChunks;
  constexpr int kPerUnit = Shape::kStageVectors / kUnits;
  static_assert(kPerUnit % Shape::kThreads == 0);
  const int present = static_cast<int>(min(x.groups - first_group, int64_t(Shape::kBlockGroups))) * kChunks * 32;
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const uint4* from = x.chunks + ((stage * kUnits + unit) * x.groups + first_group) * (kChunks * 32) + threadIdx.x;
    uint4* to = shared + unit * kPerUnit + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kPerUnit; i += Shape::kThreads) {
      if (static_cast<int>(threadIdx.x) + i < present) copy_async(to + i, from + i);
    }
  }
}

// The part of K that block `part` of `parts` does, in stages.
struct Share {
  int64_t begin, end;
};

__device__ inline Share share_of(int64_t stages, int part, int parts) {
  return {stages * part / parts, stages * (part + 1) / parts};
}

template <typename F, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    tiled_kernel(Weights w, Prepared x, Epilogue e, typename F::Accumulator* partial) {
  using Accumulator = typename F::Accumulator;
  constexpr int kUnits = Shape::kChunksPerStage / F::kChunks;
  extern __shared__ uint4 shared[];

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int64_t row_blocks = ceil_div(w.rows, Shape::kRows);
  const int64_t block_row = blockIdx.x % row_blocks * Shape::kRows;
  const int warp_row = warp % Shape::kRowWarps * (Shape::kTiles * kMmaRows);
  const int64_t first_row = block_row + warp_row;
  const int64_t first_group = blockIdx.x / row_blocks * Shape::kBlockGroups;
  const int warp_group = warp / Shape::kRowWarps * Shape::kGroups;
  const Share share = share_of(x.units / kUnits, blockIdx.y, gridDim.y);

  // Word of the unit that this lane consumes, in each of its rows. Within a block, offsets fit 32 bits.
  const uint32_t* block_words = w.packed + block_row * w.words;
  const int last_row = static_cast<int>(min(w.rows - block_row, int64_t(Shape::kRows))) - 1;
  const int words_of_row = static_cast<int>(w.words);
  const auto fetch_words = [&](int64_t unit, uint32_t (&v)[Shape::kTiles][2]) {
    const int word = static_cast<int>(unit / kUnitsPerPiece * kWordsPerPiece + unit % kUnitsPerPiece) + 4 * t;
#pragma unroll
    for (int r = 0; r < Shape::kTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = min(warp_row + r * kMmaRows + h * 8 + g, last_row);
        v[r][h] = word < words_of_row ? __ldg(block_words + row * words_of_row + word) : 0;
      }
    }
  };

  Accumulator sums[Shape::kTiles][Shape::kGroups][4] = {};
  uint32_t next[Shape::kTiles][2];
  fetch_words(share.begin * kUnits, next);
  wait_for_previous_kernel();
#pragma unroll
  for (int s = 0; s < Shape::kStages - 1; ++s) {
    if (share.begin + s < share.end) {
      fetch_stage<Shape, F::kChunks>(x, share.begin + s, first_group, shared + s * Shape::kStageVectors);
    }
    commit_copies();
  }

  int slot = 0;
  for (int64_t stage = share.begin; stage < share.end; ++stage) {
    wait_for_copies<Shape::kStages - 2>();
    __syncthreads();
    // The slot of the stage before this one, which every warp has left.
    const int free_slot = slot == 0 ? Shape::kStages - 1 : slot - 1;
    if (stage + Shape::kStages - 1 < share.end) {
      fetch_stage<Shape, F::kChunks>(x, stage + Shape::kStages - 1, first_group,
                                     shared + free_slot * Shape::kStageVectors);
    }
    commit_copies();
    const uint4* activations = shared + slot * Shape::kStageVectors + lane;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      uint32_t words[Shape::kTiles][2];
#pragma unroll
      for (int r = 0; r < Shape::kTiles; ++r) {
        words[r][0] = next[r][0];
        words[r][1] = next[r][1];
      }
      const int64_t following = stage * kUnits + u + 1;
      if (following < share.end * kUnits) fetch_words(following, next);
#pragma unroll
      for (int q = 0; q < F::kChunks; ++q) {
        uint4 b[Shape::kGroups];
#pragma unroll
        for (int i = 0; i < Shape::kGroups; ++i) {
          b[i] = activations[((u * Shape::kBlockGroups + warp_group + i) * F::kChunks + q) * 32];
        }
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const int reg = 4 * q + 2 * step;
#pragma unroll
          for (int r = 0; r < Shape::kTiles; ++r) {
            const uint32_t a[4] = {F::decode(words[r][0], reg), F::decode(words[r][1], reg),
                                   F::decode(words[r][0], reg + 1), F::decode(words[r][1], reg + 1)};
#pragma unroll
            for (int i = 0; i < Shape::kGroups; ++i) {
              mma(sums[r][i], a, component(b[i], 2 * step), component(b[i], 2 * step + 1));
            }
          }
        }
      }
    }
    slot = slot == Shape::kStages - 1 ? 0 : slot + 1;
  }

  wait_for_copies<0>();
  __syncthreads();
  Accumulator* out = reinterpret_cast<Accumulator*>(shared) + warp * Shape::kWarpOut;
#pragma unroll
  for (int r = 0; r < Shape::kTiles; ++r) {
#pragma unroll
    for (int i = 0; i < Shape::kGroups; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = i * kRowsPerGroup + 2 * t + c % 2;
        out[token * Shape::kOutPitch + r * kMmaRows + c / 2 * 8 + g] = sums[r][i][c];
      }
    }
  }
  __syncwarp();

  constexpr int kRowsOfWarp = Shape::kTiles * kMmaRows;
  constexpr int kLanesPerToken = kRowsOfWarp / 2;
  const int64_t n = first_row + lane % kLanesPerToken * 2;
  if (n >= w.rows) return;
  const bool two = n + 1 < w.rows;
  const bool pair = two && e.columns % 2 == 0;
  const int64_t first_token = (first_group + warp_group) * kRowsPerGroup;
  const int tokens = static_cast<int>(min(x.rows - first_token, int64_t(Shape::kGroups * kRowsPerGroup)));
  const Accumulator* from = out + n - first_row;
  if (partial) {
    Accumulator* part = partial + blockIdx.y * x.rows * w.rows;
    for (int token = lane / kLanesPerToken; token < tokens; token += 32 / kLanesPerToken) {
      const Accumulator* v = from + token * Shape::kOutPitch;
      Accumulator* to = part + (first_token + token) * w.rows + n;
      to[0] = v[0];
      if (two) to[1] = v[1];
    }
    return;
  }
  const Column column0 = column_of(e, n);
  const Column column1 = column_of(e, two ? n + 1 : n);
  const int limbs = e.dtype == DType::kFloat32 && !F::kInteger ? 2 : 1;
  for (int token = lane / kLanesPerToken * limbs; token < tokens; token += 32 / kLanesPerToken * limbs) {
    const Accumulator* v = from + token * Shape::kOutPitch;
    const Accumulator* low = limbs == 2 ? v + Shape::kOutPitch : v;
    const int64_t m = (first_token + token) / limbs;
    const Token scalars = x.tokens[m];
    const float y0 = finish(e, scalars, column0, limbs == 2 ? join_limbs(v[0], low[0]) : v[0]);
    const float y1 = finish(e, scalars, column1, limbs == 2 ? join_limbs(v[1], low[1]) : v[1]);
    store_pair(e, m, n, pair, y0, y1);
  }
}

// Adds the parts of split K, in order, and finishes.
template <typename Accumulator>
__global__ void __launch_bounds__(256)
    add_parts_kernel(const Accumulator* partial, int parts, Prepared x, Epilogue e, int64_t M) {
  wait_for_previous_kernel();
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= e.columns) return;
  const Column column = column_of(e, n);
  const int limbs = static_cast<int>(x.rows / M);
  for (int64_t m = blockIdx.y; m < M; m += gridDim.y) {
    Accumulator total[2] = {};
#pragma unroll
    for (int limb = 0; limb < 2; ++limb) {
#pragma unroll 4
      for (int part = 0; part < parts && limb < limbs; ++part) {
        total[limb] += partial[(part * x.rows + m * limbs + limb) * e.columns + n];
      }
    }
    store(e.out, e.dtype, m * e.columns + n, finish(e, x.tokens[m], column, join_limbs(total[0], total[1])));
  }
}

template <typename F, typename Shape>
void run_tiled(const Weights& w, const Prepared& x, const Epilogue& e, int64_t M, int parts, void* workspace,
               cudaStream_t stream) {
  using Accumulator = typename F::Accumulator;
  Accumulator* partial = parts > 1 ? static_cast<Accumulator*>(workspace) : nullptr;
  const int64_t blocks = ceil_div(w.rows, Shape::kRows) * ceil_div(x.groups, Shape::kBlockGroups);
  launch(tiled_kernel<F, Shape>,
         Grid{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts)), Shape::kThreads, Shape::kShared, true},
         stream, w, x, e, partial);
  if (parts == 1) return;
  constexpr int kThreads = 256;
  constexpr int64_t kMostRows = 4096;
  launch(add_parts_kernel<Accumulator>,
         Grid{dim3(blocks_for(e.columns, kThreads), blocks_for(M, 1, kMostRows)), kThreads, 0, true}, stream, partial,
         parts, x, e, M);
}

}  // namespace bitkernels::cuda
