// Few tokens times packed weights as products of single bits: no weight is ever decoded.
//
// Activations were taken apart into planes of bits by bit_prepare.cuh, one column of the product for each bit of each
// token; packed weights are bits already. The tensor cores count where both are set, 16 times as many products in a
// cycle as of bf16, and the epilogue adds the planes by weight, the highest being the sign. A ternary code c is two
// bits, so an activation q meets it as the pair q, 2 q. All of it is exact but the rounding to fixed point.
//
// One warpgroup brings weights and planes to shared memory: weights while the activations are still being prepared. The
// others have 64 rows of the tile each.
#pragma once

#include "bit_prepare.cuh"
#include "epilogue.cuh"
#include "hopper.cuh"
#include "weights.cuh"
#include "wgmma.cuh"

namespace bitkernels::cuda {

constexpr int kMostBitStages = 8;

// kColumns: planes of all tokens. kRowGroups: of 64 rows.
template <int kColumns_, int kRowGroups_, int kLimbs_>
struct BitTile {
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowGroups = kRowGroups_;
  static constexpr int kLimbs = kLimbs_;
  static constexpr int kTokens = kColumns / (kLimbs * kPlanesPerLimb);
  static constexpr int kRows = kRowGroups * kBitMmaRows;
  static constexpr int kThreads = 128 * (kRowGroups + 1);
  static constexpr bool kUnequalRegisters = kThreads > 384 && kColumns > 128;
  static constexpr int kWeightBytes = kRows * kPanelRowBytes;
  static constexpr int kPlanePitch = kColumns * kChunkBytes;
  static constexpr int kPlaneBytes = kPanelChunks * kPlanePitch;
  static constexpr int kTokenBytes = kTokens * sizeof(PlaneToken);
  static constexpr int kStageBytes =
      (kWeightBytes + kPlaneBytes + kTokenBytes + kPanelAlignment - 1) / kPanelAlignment * kPanelAlignment;
};

struct BitMatmulArgs {
  CUtensorMap weights;  // as bytes, where rows are whole vectors
  const uint32_t* packed;
  const uint8_t* planes;
  const PlaneToken* tokens;
  Epilogue e;
  int words;
  int M;
  int chunks;        // of K
  int panels;        // of K
  int token_groups;  // tiles of the same rows
  int row_tiles;
  int row_step, group_step;  // from a block's tile to its next one
  int stages;
  float* residual;  // [M, columns]; kAdds alone
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct BitStages {
  SharedAddress data, full, empty;
};

// A panel of a tile, and the stage it passes through.
struct BitCursor {
  int row, group, panel = 0;
  int stage = 0;
  int parity = 0;

  __device__ explicit BitCursor(const BitMatmulArgs& args)
      : row(blockIdx.x / args.token_groups), group(blockIdx.x % args.token_groups) {}

  __device__ bool inside(const BitMatmulArgs& args) const { return row < args.row_tiles; }

  __device__ void next_tile(const BitMatmulArgs& args) {
    row += args.row_step;
    group += args.group_step;
    if (group >= args.token_groups) {
      group -= args.token_groups;
      ++row;
    }
  }

  __device__ void next_stage(const BitMatmulArgs& args, int count) {
    stage += count;
    while (stage >= args.stages) {
      stage -= args.stages;
      parity ^= 1;
    }
  }

  __device__ void skip(const BitMatmulArgs& args, int count) {
    next_stage(args, count);
    panel += count;
    while (panel >= args.panels) {
      panel -= args.panels;
      next_tile(args);
    }
  }

  __device__ int chunks(const BitMatmulArgs& args) const {
    return min(args.chunks - panel * kPanelChunks, kPanelChunks);
  }
};

// By a warp.
template <class Tile, bool kAligned>
__device__ void bring_weights(const BitMatmulArgs& args, const BitStages& stages, const BitCursor& at) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(at.row) * Tile::kRows;
  const SharedAddress to = stages.data + at.stage * Tile::kStageBytes;
  const SharedAddress full = stages.full + at.stage * 8;
  const int plane_bytes = at.chunks(args) * Tile::kPlanePitch + Tile::kTokenBytes;
  if constexpr (kAligned) {
    if (lane > 0) return;
    barrier_arrive_expecting(full, Tile::kWeightBytes + plane_bytes);
    load_box(&args.weights, to, full, at.panel * kPanelRowBytes, static_cast<int>(row));
  } else {
    // Nothing is written past the end of a row, where planes are zero, nor below the last row, which is not used.
    constexpr int kWords = kPanelRowBytes / 4;
    const int word = at.panel * kWords + lane;
    const uint32_t* from = args.packed + row * args.words + word;
#pragma unroll 1
    for (int r = 0; r < Tile::kRows; ++r) {
      if (word < args.words && row + r < args.e.columns) {
        copy_or_zero<4>(to + panel_offset(r, lane / 4) + lane % 4 * 4, from, true);
      }
      from += args.words;
    }
    barrier_arrive_after_copies(full);
    if (lane == 0) barrier_arrive_expecting(full, plane_bytes);
  }
}

template <class Tile>
__device__ void bring_planes(const BitMatmulArgs& args, const BitStages& stages, const BitCursor& at) {
  const SharedAddress to = stages.data + at.stage * Tile::kStageBytes + Tile::kWeightBytes;
  const SharedAddress full = stages.full + at.stage * 8;
  load_bytes(to, args.planes + (int64_t(at.group) * args.chunks + at.panel * kPanelChunks) * Tile::kPlanePitch,
             at.chunks(args) * Tile::kPlanePitch, full);
  load_bytes(to + Tile::kPlaneBytes, args.tokens + at.group * Tile::kTokens, Tile::kTokenBytes, full);
}

// Several warps take turns. No more of them than there are stages, as a warp that is two rounds ahead of another would
// take a stage's last phase for its next one.
template <class Tile, bool kAligned>
__device__ void bring(const BitMatmulArgs& args, const BitStages& stages) {
  const int warps = min(args.stages, 4);
  const int warp = threadIdx.x / 32 % 4;
  if (warp >= warps) return;
  BitCursor first(args);
  first.skip(args, warp);
  BitCursor at = first;
#pragma unroll 1
  for (int i = warp; i < args.stages && at.inside(args); i += warps) {
    bring_weights<Tile, kAligned>(args, stages, at);
    at.skip(args, warps);
  }
  wait_for_previous_kernel();
  at = first;
#pragma unroll 1
  for (int i = warp; at.inside(args); i += warps) {
    if (i >= args.stages) {
      barrier_wait(stages.empty + at.stage * 8, at.parity ^ 1);
      bring_weights<Tile, kAligned>(args, stages, at);
    }
    if (threadIdx.x % 32 == 0) bring_planes<Tile>(args, stages, at);
    __syncwarp();
    at.skip(args, warps);
  }
}

// This warp has done with the stage.
__device__ inline void release(const BitStages& stages, int stage) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(stages.empty + stage * 8);
}

template <typename F, typename T, class Tile, bool kAligned, bool kAdds>
__device__ void multiply(const BitMatmulArgs& args, const BitStages& stages) {
  constexpr int kLimbs = Tile::kLimbs;
  constexpr int kKept = Tile::kTokens > 1 ? Tile::kTokens / 2 : 1;  // tokens of a lane, in the end
  const int warp = uniform(threadIdx.x / 32);
  const int t = threadIdx.x % 4;
  const int row_of_lane = warp * kMmaRows + t / 2 * 8 + threadIdx.x % 32 / 4;
  const int first_kept = Tile::kTokens > 1 ? t % 2 * kKept : 0;
  const auto column_at = [&](const BitCursor& at) {
    const int64_t n = int64_t(at.row) * Tile::kRows + row_of_lane;
    return n < args.e.columns ? column_of(args.e, n) : Column{};
  };

  BitCursor at(args);
  Column next_column = column_at(at);
  if constexpr (kAdds) wait_for_previous_kernel();
#pragma unroll 1
  while (at.inside(args)) {
    const Column column = next_column;
    const int64_t n = int64_t(at.row) * Tile::kRows + row_of_lane;
    const int first_token = at.group * Tile::kTokens + first_kept;
    at.next_tile(args);
    next_column = column_at(at);
    int d[Tile::kColumns / 2];
#pragma unroll
    for (int i = 0; i < Tile::kColumns / 2; ++i) d[i] = 0;
    int last = at.stage;
#pragma unroll 1
    for (at.panel = 0; at.panel < args.panels; ++at.panel) {
      barrier_wait(stages.full + at.stage * 8, at.parity);
      if (!kAligned) copy_engine_fence();
      const SharedAddress data = stages.data + at.stage * Tile::kStageBytes;
      uint64_t a = wgmma_descriptor(data + warp / 4 * (kBitMmaRows * kPanelRowBytes));
      uint64_t b = chunk_descriptor(data + Tile::kWeightBytes, Tile::kPlanePitch);
      pin(d);
#pragma unroll 1
      for (int s = at.chunks(args) / kBitMmaChunks; s > 0; --s) {
        wgmma_fence();
        if constexpr (Tile::kUnequalRegisters) {
          // The compiler does not see the registers that this kernel takes for an instruction of 256 columns.
          wgmma_bits(*reinterpret_cast<int (*)[64]>(&d[0]), a, b, 1);
          wgmma_bits(*reinterpret_cast<int (*)[64]>(&d[64]), a, b + (128 * kChunkBytes >> 4), 1);
        } else {
          wgmma_bits(d, a, b, 1);
        }
        a += kBitMmaChunks * kChunkBytes >> 4;
        b += kBitMmaChunks * Tile::kPlanePitch >> 4;
      }
      wgmma_commit();
      // The products of the panel before are there, so that those of this one never wait for the next.
      wgmma_wait<1>();
      if (at.panel > 0) release(stages, last);
      last = at.stage;
      at.next_stage(args, 1);
    }
    wgmma_wait<0>();
    pin(d);

    int sum[kLimbs][kKept];
#pragma unroll
    for (int l = 0; l < kLimbs; ++l) add_planes<Tile::kTokens, kLimbs>(d, l, sum[l]);
    T* out = static_cast<T*>(args.e.out) + int64_t(first_token) * args.e.columns + n;
    const bool stores = n < args.e.columns && (Tile::kTokens > 1 || t % 2 == 0);
    float* residual = args.residual + int64_t(first_token) * args.e.columns + n;
    const int left = stores ? args.M - first_token : 0;
    float added[kKept];
    if constexpr (kAdds) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) added[i] = i < left ? residual[i * args.e.columns] : 0.0f;
    }
    const SharedAddress tokens = stages.data + last * Tile::kStageBytes + Tile::kWeightBytes + Tile::kPlaneBytes +
                                 first_kept * sizeof(PlaneToken);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      uint32_t words[4];
      load_words(tokens + i * sizeof(PlaneToken), words);
      const float unit = __uint_as_float(words[0]);
#pragma unroll
      for (int l = 0; l < kLimbs; ++l) sum[l][i] = F::kStep * sum[l][i] - static_cast<int>(words[2 + l]);
      float y;
      if constexpr (F::kInteger) {
        y = finish(args.e, Token{unit, 0.0f, 0.0f}, column, sum[0][i]);
      } else {
        float f = static_cast<float>(sum[0][i]);
        if constexpr (kLimbs == 2) f = fmaf(static_cast<float>(sum[1][i]), 65536.0f, f);
        y = finish(args.e, Token{1.0f, 0.0f, __uint_as_float(words[1])}, column, f * unit);
      }
      if (i >= left) continue;
      if constexpr (kAdds) {
        residual[i * args.e.columns] = added[i] + y;
      } else {
        out[i * args.e.columns] = from_float<T>(y);
      }
    }
    release(stages, last);
  }
}

#endif

// kAdds: what would be the output is added to the residual, in a chain of kernels that overlap.
template <typename F, typename T, class Tile, bool kAligned, bool kAdds = false>
__global__ void __launch_bounds__(Tile::kThreads, 1) bit_matmul_kernel(const __grid_constant__ BitMatmulArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kAdds) let_next_kernel_start();
  extern __shared__ uint4 shared[];
  __shared__ uint64_t full[kMostBitStages], empty[kMostBitStages];
  const BitStages stages{(shared_address(shared) + kPanelAlignment - 1) / kPanelAlignment * kPanelAlignment,
                         shared_address(full), shared_address(empty)};
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < args.stages; ++i) {
      barrier_init(stages.full + i * 8, kAligned ? 1 : 33);
      barrier_init(stages.empty + i * 8, 4 * Tile::kRowGroups);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (uniform(threadIdx.x / 128) == Tile::kRowGroups) {
    if constexpr (Tile::kUnequalRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    bring<Tile, kAligned>(args, stages);
  } else {
    if constexpr (Tile::kUnequalRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    multiply<F, T, Tile, kAligned, kAdds>(args, stages);
  }
#endif
}

}  // namespace bitkernels::cuda
