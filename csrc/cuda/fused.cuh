// A handful of tokens: one kernel from activations to output, so that no launch waits for another.
//
// A block owns 16-row tiles of the weights. It asks for its weights first, and while they travel it turns
// the activations into fixed point: int8 limbs q0 + 256 q1 + ..., in steps of a power of two of the
// token. Each limb of each token is a column of the u8 x s8 tensor cores. `word & mask` leaves one code in
// each byte of a register, so a lane's word is a row of the operand with 8 (4) planes, bit p weighing 2^p;
// planes of equal weight share an accumulator, and the exact sum of all is taken once a tile.
//
// Everything up to the last step is integer, so order does not matter: warps add up with atomics in shared
// memory and results are the same bits on every run. With code <= 3 and |limb| <= 128 an accumulator stays
// below 768 K in 32 bits, and |sum of weight * limb| <= 128 K <= 2^24 is exact in fp32 up to kMostFusedK.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "epilogue.cuh"
#include "weights.cuh"

namespace bitkernels::cuda {

constexpr int kFusedWarps = 16;
constexpr int kFusedThreads = 32 * kFusedWarps;
constexpr int kFusedColumns = 8;        // of one mma: tokens times limbs
constexpr int kFusedTokens = 4;         // at most: more loads at once than that do not fit in registers
constexpr int kFusedDepth = 4;          // pieces in flight for each warp: 64 KB for the block
constexpr int kMostTilesPerBlock = 64;  // bounds the sums in shared memory
constexpr int64_t kMostFusedK = 131072;

// Eight bits each, of the token's largest element: at least 14 for bf16, which has 8 itself, 22 for fp16 (11)
// and 30 for fp32 (24), so that a token's largest elements are kept exactly.
template <typename F, typename T>
constexpr int kLimbs = F::kInteger               ? 1
                       : std::is_same_v<T, bf16> ? 2
                       : std::is_same_v<T, fp16> ? 3
                                                 : 4;

template <typename F, typename T>
constexpr int kFusedMost = kFusedColumns / kLimbs<F, T> < kFusedTokens ? kFusedColumns / kLimbs<F, T> : kFusedTokens;

template <typename F>
struct FusedOrder {
  static constexpr int kBits = 32 / F::kPerWord;
  static constexpr int kPlanes = 8 / kBits;
  static constexpr int kSums = kPlanes / 2;  // planes p and p + kSums weigh the same, after a shift by 4
  static constexpr int kPlanePairs = kPlanes / 2;
  static constexpr int kStepsPerPiece = 2 * kPlanePairs;  // two words of a lane times two planes
  static constexpr uint32_t kMask = (1 << kBits) - 1;

  static __device__ uint32_t plane(uint32_t word, int p) {
    return (p < kSums ? word : word >> 4) & (kMask * 0x01010101) << kBits * (p % kSums);
  }
};

// Shared memory: activations [step][column][lane of a quad] as 16 bytes {planes 2r, 2r + 1 of an even word,
// the same of the next word}, and sums [tile][column][row]. Two vectors more a step keep writers apart.
__host__ __device__ constexpr int fused_pitch(int columns) { return 4 * columns + 2; }

struct FusedShape {
  int64_t pieces;
  int columns;
  int tiles;  // of 16 rows: as many for each block, one more for the first `extra` blocks
  int extra;
  unsigned blocks;
  size_t activation_bytes;
  size_t shared_bytes;
};

template <typename F>
FusedShape fused_shape(int64_t columns, int64_t N, int64_t K, int processors) {
  FusedShape s;
  const int64_t tiles = ceil_div(N, kMmaRows);
  const int64_t waves = ceil_div(tiles, int64_t(processors) * kMostTilesPerBlock);
  const int64_t blocks = tiles < waves * processors ? tiles : waves * processors;
  s.pieces = ceil_div(ceil_div(K, F::kPerWord), kWordsPerPiece);
  s.columns = static_cast<int>(columns);
  s.tiles = static_cast<int>(tiles / blocks);
  s.extra = static_cast<int>(tiles % blocks);
  s.blocks = static_cast<unsigned>(blocks);
  s.activation_bytes = sizeof(uint4) * s.pieces * FusedOrder<F>::kStepsPerPiece * fused_pitch(s.columns);
  s.shared_bytes = s.activation_bytes + sizeof(int) * (s.tiles + 1) * kMmaRows * columns;
  return s;
}

// The exponent of the step: the largest element is below 2^(8 kCount - 1) steps, less the 1/256 that
// keeps the highest limb within int8.
template <int kCount>
__device__ int step_exponent(float absmax) {
  const int exponent = static_cast<int>(__float_as_uint(absmax * (1.0f + 1.0f / 128.0f)) >> 23) - 127;
  return max(exponent - (8 * kCount - 2), -120);
}

// Bytes v[0..3] of each of four registers, as one register a limb.
template <int kCount>
__device__ void split_limbs(int (&v)[4], uint32_t (&limb)[kCount]) {
#pragma unroll
  for (int l = 0; l < kCount; ++l) {
    limb[l] = __byte_perm(__byte_perm(v[0], v[1], 0x0040), __byte_perm(v[2], v[3], 0x0040), 0x5410);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = (v[e] + 128) >> 8;
  }
}

// A lane has elements 8 c .. 8 c + 7 of a row, a byte each. Lanes that share a word exchange bytes: lane r
// of them gets planes 2r and 2r + 1 of the word.
template <typename F>
__device__ uint2 gather_planes(uint32_t first, uint32_t second) {
  constexpr uint32_t kLowPair = 0x5140;   // bytes 0 and 1 of two registers, interleaved
  constexpr uint32_t kHighPair = 0x7362;  // bytes 2 and 3
  const int lane = threadIdx.x % 32;
  const bool odd = lane & 1;
  if constexpr (FusedOrder<F>::kBits == 1) {
    const bool upper = lane & 2;
    const uint32_t other = __shfl_xor_sync(0xffffffff, upper ? first : second, 2);
    first = upper ? other : first;
    second = upper ? second : other;
  }
  const uint32_t mine = __byte_perm(first, second, odd ? kHighPair : kLowPair);
  const uint32_t other = __shfl_xor_sync(0xffffffff, __byte_perm(first, second, odd ? kLowPair : kHighPair), 1);
  const uint32_t even_bytes = odd ? other : mine;
  const uint32_t odd_bytes = odd ? mine : other;
  if constexpr (FusedOrder<F>::kBits == 1) {
    return {__byte_perm(even_bytes, odd_bytes, kLowPair), __byte_perm(even_bytes, odd_bytes, kHighPair)};
  } else {
    return {__byte_perm(even_bytes, odd_bytes, 0x5410), __byte_perm(even_bytes, odd_bytes, 0x7632)};
  }
}

// Eight elements of a row.
template <typename T>
struct alignas(16) Eight {
  T e[8];
};

template <typename T>
__device__ Eight<T> load_eight(const T* from) {
  return *reinterpret_cast<const Eight<T>*>(from);
}

__device__ inline Eight<float> load_factors(const float* factors, int64_t k) {
  return factors ? load_eight(factors + k) : Eight<float>{{1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f}};
}

template <typename F, typename T>
__global__ void __launch_bounds__(kFusedThreads, 1)
    fused_kernel(Weights w, TokenSource s, Epilogue e, FusedShape shape) {
  using Order = FusedOrder<F>;
  constexpr int kCount = kLimbs<F, T>;
  constexpr int kTokens = kFusedMost<F, T>;
  extern __shared__ uint4 shared[];
  __shared__ uint32_t warp_most[kTokens][kFusedWarps];
  __shared__ float warp_plain[kTokens][kFusedWarps];
  __shared__ float token_plain[kTokens];
  __shared__ int limb_sums[kFusedColumns];
  int* sums = reinterpret_cast<int*>(reinterpret_cast<char*>(shared) + shape.activation_bytes);

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int block = static_cast<int>(blockIdx.x);
  const int tiles = shape.tiles + (block < shape.extra);
  const int64_t first_row = (int64_t(block) * shape.tiles + min(block, shape.extra)) * kMmaRows;
  const int rows = static_cast<int>(min(w.rows - first_row, int64_t(tiles) * kMmaRows));
  const int pieces = static_cast<int>(shape.pieces);
  const int columns = shape.columns;
  const int pitch = fused_pitch(columns);
  const int tokens = static_cast<int>(s.M);

  // A warp takes consecutive pieces, along the rows of a tile and on to the next tile.
  const int tasks = tiles * pieces;
  int task = tasks * warp / kFusedWarps;
  const int end = tasks * (warp + 1) / kFusedWarps;
  int tile = pieces ? task / pieces : 0;
  int piece = task - tile * pieces;
  int next_tile = tile;
  int next_piece = piece;
  const auto fetch = [&](bool wanted, uint4(&v)[2]) {
    if (!wanted) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(next_tile * kMmaRows + h * 8 + g, rows - 1);
      const int64_t word = next_piece * kWordsPerPiece + 4 * t;
      const uint32_t* from = w.packed + (first_row + row) * w.words + word;
      v[h] = word < w.words ? load_streaming(reinterpret_cast<const uint4*>(from)) : uint4{};
    }
    if (++next_piece == pieces) {
      next_piece = 0;
      ++next_tile;
    }
  };
  uint4 ring[kFusedDepth][2];
#pragma unroll
  for (int d = 0; d < kFusedDepth; ++d) fetch(task + d < end, ring[d]);

  // Needed last, and as far away as the rest.
  Column column =
      static_cast<int>(threadIdx.x) < rows * tokens ? column_of(e, first_row + threadIdx.x % rows) : Column{};
  for (int i = threadIdx.x; i < tiles * kMmaRows * columns; i += kFusedThreads) sums[i] = 0;
  if (threadIdx.x < kFusedColumns) limb_sums[threadIdx.x] = 0;

  const T* x = static_cast<const T*>(s.x);
  // All tokens' loads before the first use of one.
  const auto load_tokens = [&](int64_t k, Eight<T>(&raw)[kTokens]) {
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (m >= tokens) break;
      raw[m] = load_eight(x + m * s.K + k);
    }
  };
  uint32_t most[kTokens] = {};
  float plain[kTokens] = {};
  for (int64_t k = 8 * threadIdx.x; k < s.K; k += 8 * kFusedThreads) {
    const Eight<float> scale = load_factors(s.scale, k);
    const Eight<float> shift = load_factors(s.shift, k);
    Eight<T> raw[kTokens];
    load_tokens(k, raw);
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (m >= tokens) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float v = to_float(raw[m].e[i]);
        // As integers, NaN is the largest of all.
        most[m] = max(most[m], __float_as_uint(fabsf(v * scale.e[i])));
        if (s.has_plain) plain[m] = fmaf(v, shift.e[i], plain[m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    if (m >= tokens) break;
    most[m] = __reduce_max_sync(0xffffffff, most[m]);
    if (s.has_plain) plain[m] = warp_reduce(plain[m], Sum());
    if (lane == 0) {
      warp_most[m][warp] = most[m];
      warp_plain[m][warp] = plain[m];
    }
  }
  __syncthreads();

  float steps_per_unit[kTokens];
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    if (m >= tokens) break;
    most[m] = __reduce_max_sync(0xffffffff, warp_most[m][lane % kFusedWarps]);
    const float absmax = __uint_as_float(most[m]);
    steps_per_unit[m] = F::kInteger ? int8_scale(absmax) : power_of_two(-step_exponent<kCount>(absmax));
  }
  if (s.has_plain && warp < tokens) {
    const float total = warp_reduce(lane < kFusedWarps ? warp_plain[warp][lane] : 0.0f, Sum());
    if (lane == 0) token_plain[warp] = total;
  }

  // Whole pieces: what lies past K is zero. The second read of x and the scales comes from the L1 cache.
  int my_sums[kTokens][kCount] = {};
  uint2* activations = reinterpret_cast<uint2*>(shared);
  const int chunks = pieces * (kWordsPerPiece * F::kPerWord / 8);
  for (int c = threadIdx.x; c < chunks; c += kFusedThreads) {
    const bool inside = 8 * int64_t(c) < s.K;
    const int64_t k = inside ? 8 * int64_t(c) : 0;
    const int word = c / Order::kPlanePairs;
    const int pair = c % Order::kPlanePairs;
    const int step = (word / kWordsPerPiece * 2 + word % 4 / 2) * Order::kPlanePairs + pair;
    const Eight<float> scale = load_factors(s.scale, k);
    Eight<T> raw[kTokens];
    load_tokens(k, raw);
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (m >= tokens) break;
      const float steps = inside ? steps_per_unit[m] : 0.0f;
      int q[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float scaled = to_float(raw[m].e[i]) * scale.e[i];
        q[i / 4][i % 4] = F::kInteger ? to_int8(scaled, steps) : __float2int_rn(scaled * steps);
      }
      uint32_t first[kCount], second[kCount];
      split_limbs(q[0], first);
      split_limbs(q[1], second);
#pragma unroll
      for (int l = 0; l < kCount; ++l) {
        my_sums[m][l] = __dp4a(static_cast<int>(first[l]), 0x01010101, my_sums[m][l]);
        my_sums[m][l] = __dp4a(static_cast<int>(second[l]), 0x01010101, my_sums[m][l]);
        activations[2 * (step * pitch + (m * kCount + l) * 4 + word / 4 % 4) + word % 2] =
            gather_planes<F>(first[l], second[l]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    if (m >= tokens) break;
#pragma unroll
    for (int l = 0; l < kCount; ++l) {
      const int sum = __reduce_add_sync(0xffffffff, my_sums[m][l]);
      if (lane == 0) atomicAdd(&limb_sums[m * kCount + l], sum);
    }
  }
  __syncthreads();

  int planes[Order::kSums][4] = {};
  const uint4* mine = shared + min(g, columns - 1) * 4 + t;
  const auto consume = [&](const uint4(&v)[2]) {
    const uint4* b = mine + piece * (Order::kStepsPerPiece * pitch);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int pair = 0; pair < Order::kPlanePairs; ++pair) {
        const uint4 q = b[(half * Order::kPlanePairs + pair) * pitch];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int p = 2 * pair + i;
          const uint32_t a[4] = {Order::plane(component(v[0], 2 * half), p), Order::plane(component(v[1], 2 * half), p),
                                 Order::plane(component(v[0], 2 * half + 1), p),
                                 Order::plane(component(v[1], 2 * half + 1), p)};
          mma(planes[p % Order::kSums], a, i ? q.y : q.x, i ? q.w : q.z);
        }
      }
    }
  };
  const auto flush = [&] {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int sum = 0;
#pragma unroll
      for (int p = 0; p < Order::kSums; ++p) {
        sum += planes[p][c] >> Order::kBits * p;
        planes[p][c] = 0;
      }
      const int to = 2 * t + c % 2;
      if (to < columns) atomicAdd(&sums[(tile * columns + to) * kMmaRows + c / 2 * 8 + g], sum);
    }
  };
  while (task < end) {
#pragma unroll
    for (int d = 0; d < kFusedDepth; ++d) {
      if (task >= end) break;
      consume(ring[d]);
      fetch(task + kFusedDepth < end, ring[d]);
      ++task;
      ++piece;
      if (piece == pieces || task == end) {
        flush();
        piece = 0;
        ++tile;
      }
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < rows * tokens; i += kFusedThreads) {
    const int n = i % rows;
    const int m = i / rows;
    if (i >= kFusedThreads) column = column_of(e, first_row + n);
    const int* total = sums + (n / kMmaRows * columns + m * kCount) * kMmaRows + n % kMmaRows;
    uint32_t token_most = 0;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) token_most = j == m ? most[j] : token_most;
    const float absmax = __uint_as_float(token_most);
    float y;
    if constexpr (F::kInteger) {
      y = finish(e, Token{int8_scale(absmax), __int_as_float(limb_sums[m]), 0.0f}, column, total[0]);
    } else {
      float value = 0.0f;
#pragma unroll
      for (int l = kCount - 1; l >= 0; --l) {
        value = fmaf(value, 256.0f, static_cast<float>(F::kStep * total[l * kMmaRows] - limb_sums[m * kCount + l]));
      }
      // Fixed point has no infinities: a token that holds one, or NaN, gives NaN.
      const float unit = absmax <= FLT_MAX ? power_of_two(step_exponent<kCount>(absmax)) : NAN;
      y = finish(e, Token{unit, 0.0f, s.has_plain ? token_plain[m] : 0.0f}, column, value);
    }
    store(e.out, e.dtype, m * e.columns + first_row + n, y);
  }
}

template <typename F>
FusedShape fused_shape(int64_t M, int64_t N, int64_t K, DType dtype) {
  int64_t columns = 0;
  dispatch_float(dtype, [&](auto t) { columns = M * kLimbs<F, decltype(t)>; });
  return fused_shape<F>(columns, N, K, device_attribute(cudaDevAttrMultiProcessorCount));
}

// Rows are whole, aligned vectors: one path through the kernel keeps it short.
template <typename F>
bool fused_applies(const TokenSource& s, const Weights& w) {
  int64_t most = 0;
  dispatch_float(s.dtype, [&](auto t) { most = kFusedMost<F, decltype(t)>; });
  const bool vector = w.vector && s.K % 8 == 0 && aligned(s.x, 16) && aligned(s.scale, 16) && aligned(s.shift, 16);
  if (s.M > most || s.K > kMostFusedK || !vector) return false;
  constexpr size_t kStatic = 2048;  // room for the kernel's own shared variables
  return fused_shape<F>(s.M, w.rows, s.K, s.dtype).shared_bytes + kStatic <=
         static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

template <typename F>
void run_fused(const TokenSource& s, const Weights& w, const Epilogue& e, cudaStream_t stream) {
  const FusedShape shape = fused_shape<F>(s.M, w.rows, s.K, s.dtype);
  const Grid grid{dim3(shape.blocks), kFusedThreads, shape.shared_bytes};
  dispatch_float(s.dtype, [&](auto t) { launch(fused_kernel<F, decltype(t)>, grid, stream, w, s, e, shape); });
}

}  // namespace bitkernels::cuda
