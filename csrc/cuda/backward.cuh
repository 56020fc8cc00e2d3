// dx[M, K] = epilogue(prepared dy[M, N] times packed weights[N, K]): the contraction runs down the rows.
//
// An operand register pairs the same column of two rows, so the words of two rows are first interleaved by
// halves; lane g of a quad row then shifts its column to bit 0 and masks. As in the forward pass, a masked
// bit is a subnormal fp16, here times a constant of the register that the epilogue takes away again.
//
// A block makes 128 columns times 128 tokens; each of its 2 x 2 warps 64 times 64.
#pragma once

#include "epilogue.cuh"
#include "tiled.cuh"

namespace bitkernels::cuda {

// The operands of the column tiles of one word: registers a[tile] of 16 columns times 16 rows, of which
// this lane holds rows w[0] .. w[3].
struct SignColumns {
  using Gradient = GradientF16<2>;
  static constexpr int kPerWord = 32;
  static constexpr int kTiles = 2;
  static constexpr float kUpperRows = 1.0f / 256.0f;  // columns 8..15 of a tile sit at bit 8

  static __device__ void decode(const uint4& w, int g, uint32_t (&a)[kTiles][4]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t halves = tile ? 0x7632 : 0x5410;
      const uint32_t first = __byte_perm(w.x, w.y, halves) >> g;
      const uint32_t second = __byte_perm(w.z, w.w, halves) >> g;
      a[tile][0] = first & 0x00010001;
      a[tile][1] = first & 0x01000100;
      a[tile][2] = second & 0x00010001;
      a[tile][3] = second & 0x01000100;
    }
  }
};

struct TernaryColumns {
  using Gradient = GradientF16<1>;
  static constexpr int kPerWord = 16;
  static constexpr int kTiles = 1;
  static constexpr float kUpperRows = 1.0f;

  static __device__ void decode(const uint4& w, int g, uint32_t (&a)[kTiles][4]) {
    constexpr uint32_t kMask = 0x00030003;
    a[0][0] = __byte_perm(w.x, w.y, 0x5410) >> 2 * g & kMask;
    a[0][1] = __byte_perm(w.x, w.y, 0x7632) >> 2 * g & kMask;
    a[0][2] = __byte_perm(w.z, w.w, 0x5410) >> 2 * g & kMask;
    a[0][3] = __byte_perm(w.z, w.w, 0x7632) >> 2 * g & kMask;
  }
};

// The sums that dalpha and dbeta are made of, one row of [rows][columns] for each warp of tokens.
struct ScaleGradients {
  const void* x;  // [M, columns] dtype, or null: not wanted
  float* dalpha;
  float* dbeta;
};

template <typename W>
struct BackwardShape : WideTile {
  static constexpr int kWordsOfTile = kRows / W::kPerWord;
  static constexpr int kWordsOfWarp = kWordsOfTile / kRowWarps;
  static constexpr int kDepth = 128;  // rows of the weights in a stage: four units of dy
  static constexpr size_t kWordBytes = sizeof(uint32_t) * kWordsOfTile * kDepth;
  static constexpr size_t kMainBytes = kStageBytes + 2 * kWordBytes;
  static constexpr size_t kShared = kMainBytes > kOutBytes ? kMainBytes : kOutBytes;
};

template <typename W>
__global__ void __launch_bounds__(BackwardShape<W>::kThreads, 2)
    backward_kernel(Weights w, Prepared dy, Epilogue e, ScaleGradients gradients) {
  using Shape = BackwardShape<W>;
  static_assert(Shape::kDepth == Shape::kThreads);
  extern __shared__ uint4 shared[];
  uint32_t* shared_words = reinterpret_cast<uint32_t*>(shared + Shape::kStages * Shape::kStageVectors);

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int64_t column_blocks = ceil_div(w.words, Shape::kWordsOfTile);
  const int64_t first_word = blockIdx.x % column_blocks * Shape::kWordsOfTile;
  const int64_t first_group = blockIdx.x / column_blocks * Shape::kBlockGroups;
  const int column_warp = warp % Shape::kRowWarps;
  const int warp_group = warp / Shape::kRowWarps * Shape::kGroups;
  const int64_t stages = dy.units / (Shape::kDepth / 32);

  // This thread brings the words of one row of a stage: [word][row] in shared memory.
  constexpr int kVectors = Shape::kWordsOfTile / 4;
  const auto fetch_words = [&](int64_t stage, uint4(&v)[kVectors]) {
    const int64_t n = stage * Shape::kDepth + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      v[i] = n < w.rows ? load_words(w, w.packed + n * w.words + first_word + 4 * i, w.words - first_word - 4 * i)
                        : uint4{};
    }
  };

  float sums[Shape::kTiles][Shape::kGroups][4] = {};
  uint4 next[kVectors];
  fetch_words(0, next);
  wait_for_previous_kernel();
#pragma unroll
  for (int s = 0; s < Shape::kStages - 1; ++s) {
    if (s < stages) fetch_stage<Shape, 1>(dy, s, first_group, shared + s * Shape::kStageVectors);
    commit_copies();
  }

  int slot = 0;
  for (int64_t stage = 0; stage < stages; ++stage) {
    uint32_t* words = shared_words + stage % 2 * (Shape::kWordsOfTile * Shape::kDepth);
#pragma unroll
    for (int i = 0; i < Shape::kWordsOfTile; ++i) {
      words[i * Shape::kDepth + threadIdx.x] = component(next[i / 4], i % 4);
    }
    if (stage + 1 < stages) fetch_words(stage + 1, next);
    wait_for_copies<Shape::kStages - 2>();
    __syncthreads();
    const int free_slot = slot == 0 ? Shape::kStages - 1 : slot - 1;
    if (stage + Shape::kStages - 1 < stages) {
      fetch_stage<Shape, 1>(dy, stage + Shape::kStages - 1, first_group, shared + free_slot * Shape::kStageVectors);
    }
    commit_copies();
    const uint4* gradient = shared + slot * Shape::kStageVectors + lane;
    const uint32_t* mine = words + column_warp * Shape::kWordsOfWarp * Shape::kDepth + 8 * t;
#pragma unroll
    for (int unit = 0; unit < Shape::kDepth / 32; ++unit) {
      uint4 b[Shape::kGroups];
#pragma unroll
      for (int i = 0; i < Shape::kGroups; ++i) {
        b[i] = gradient[(unit * Shape::kBlockGroups + warp_group + i) * 32];
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int word = 0; word < Shape::kWordsOfWarp; ++word) {
          uint32_t a[W::kTiles][4];
          W::decode(*reinterpret_cast<const uint4*>(mine + word * Shape::kDepth + unit * 32 + step * 4), g, a);
#pragma unroll
          for (int tile = 0; tile < W::kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < Shape::kGroups; ++i) {
              mma(sums[word * W::kTiles + tile][i], a[tile], component(b[i], 2 * step), component(b[i], 2 * step + 1));
            }
          }
        }
      }
    }
    slot = slot == Shape::kStages - 1 ? 0 : slot + 1;
  }

  wait_for_copies<0>();
  __syncthreads();
  float* out = reinterpret_cast<float*>(shared) + warp * Shape::kWarpOut;
#pragma unroll
  for (int r = 0; r < Shape::kTiles; ++r) {
#pragma unroll
    for (int i = 0; i < Shape::kGroups; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = i * kRowsPerGroup + 2 * t + c % 2;
        out[token * Shape::kOutPitch + r * kMmaRows + c / 2 * 8 + g] =
            c < 2 ? sums[r][i][c] : sums[r][i][c] * W::kUpperRows;
      }
    }
  }
  __syncwarp();

  const int64_t k = first_word * W::kPerWord + column_warp * (Shape::kTiles * kMmaRows) + 2 * lane;
  if (k >= e.columns) return;
  const bool two = k + 1 < e.columns;
  const bool pair = two && e.columns % 2 == 0;
  const Column column0 = column_of(e, k);
  const Column column1 = column_of(e, two ? k + 1 : k);
  const int limbs = e.dtype == DType::kFloat32 ? 2 : 1;
  const int64_t first_token = (first_group + warp_group) * kRowsPerGroup;
  const int tokens = static_cast<int>(min(dy.rows - first_token, int64_t(Shape::kGroups * kRowsPerGroup)));
  float dalpha[2] = {};
  float dbeta[2] = {};
  for (int token = 0; token < tokens; token += limbs) {
    const float* v = out + token * Shape::kOutPitch + 2 * lane;
    const float* low = v + Shape::kOutPitch;
    const int64_t m = (first_token + token) / limbs;
    const Token scalars = dy.tokens[m];
    const float v0 = limbs == 2 ? join_limbs(v[0], low[0]) : v[0];
    const float v1 = limbs == 2 ? join_limbs(v[1], low[1]) : v[1];
    store_pair(e, m, k, pair, finish(e, scalars, column0, v0), finish(e, scalars, column1, v1));
    if (gradients.x) {
      const float x0 = load(gradients.x, e.dtype, m * e.columns + k);
      const float x1 = two ? load(gradients.x, e.dtype, m * e.columns + k + 1) : 0.0f;
      dalpha[0] = fmaf(x0, sign_sum(scalars, v0), dalpha[0]);
      dalpha[1] = fmaf(x1, sign_sum(scalars, v1), dalpha[1]);
      dbeta[0] = fmaf(x0, scalars.plain, dbeta[0]);
      dbeta[1] = fmaf(x1, scalars.plain, dbeta[1]);
    }
  }
  if (!gradients.x) return;
  const int64_t row = (blockIdx.x / column_blocks * Shape::kTokenWarps + warp / Shape::kRowWarps) * e.columns + k;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (k + i >= e.columns) break;
    gradients.dalpha[row + i] = dalpha[i];
    gradients.dbeta[row + i] = dbeta[i];
  }
}

// Rows of partial dalpha and dbeta.
inline int64_t gradient_rows(const Prepared& dy) {
  return ceil_div(dy.groups, WideTile::kBlockGroups) * WideTile::kTokenWarps;
}

template <typename W>
void run_backward(const TokenSource& source, const uint32_t* w_packed, const Epilogue& e,
                  const ScaleGradients& gradients, void* workspace, cudaStream_t stream) {
  using Shape = BackwardShape<W>;
  const Weights w = weights(w_packed, source.K, ceil_div(e.columns, W::kPerWord));
  const Prepared dy = prepared<typename W::Gradient>(source.M, source.K, source.dtype, workspace);
  prepare_tokens<typename W::Gradient>(source, dy, stream);
  const int64_t blocks = ceil_div(w.words, Shape::kWordsOfTile) * ceil_div(dy.groups, Shape::kBlockGroups);
  launch(backward_kernel<W>, Grid{dim3(static_cast<unsigned>(blocks)), Shape::kThreads, Shape::kShared, true}, stream,
         w, dy, e, gradients);
}

}  // namespace bitkernels::cuda
