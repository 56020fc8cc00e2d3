// Activations become sums and differences of pairs of columns, as PairOperand meets them.
#pragma once

#include <algorithm>

#include "hopper.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "warpgroup_tile.cuh"

namespace bitkernels::cuda {

struct PairRows {
  const void* x;       // [M, K]
  const float* scale;  // of a column; null: 1
  const float* shift;  // as scale
  const float* norm;   // null, or the weight of an RMSNorm that goes before
  float eps;
  fp16* pairs;        // [M, pitch], zeros past K
  Int8Token* tokens;  // sum: as float, of x times shift; scale: what the pairs were divided by
  int64_t M, K, pitch;
};

constexpr int kPairColumns = 16;  // of a thread

// Of 32 columns that meet a word, groups of four are made of columns 4n, 4n + 1, 4n + 16 and 4n + 17 for n < 4, and
// then of those two further on: the sum and the difference of the first two, and of the last two. A thread has columns
// 8h to 8h + 7 and those 16 further on, and they become two groups of each kind, in the same places.
__device__ inline int64_t pair_column(int64_t chunk, int half) {
  return chunk / 2 * kSignsPerWord + chunk % 2 * 8 + half * 16;
}

// As it lies in memory, zeros past K.
template <typename T>
struct alignas(16) RawPairChunk {
  T v[2][8];

  template <bool kVectors>
  __device__ void load(const T* row, int64_t chunk, int64_t K) {
    constexpr int kOfVector = kVectors ? 16 / sizeof(T) : 1;
    using Vector = std::conditional_t<kVectors, uint4, T>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 8; i += kOfVector) {
        const int64_t k = pair_column(chunk, half) + i;
        Vector& to = *reinterpret_cast<Vector*>(&v[half][i]);
        if (k < K)
          to = *reinterpret_cast<const Vector*>(row + k);
        else
          to = Vector{};
      }
    }
  }
};

struct PairChunk {
  float v[2][8];

  template <typename T>
  __device__ void widen(const RawPairChunk<T>& raw) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[half][i] = to_float(raw.v[half][i]);
    }
  }

  __device__ void store(fp16* row, int64_t chunk, float scale) const {
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = v[i % 2][i / 2 * 4 + 2 * kind] * scale, b = v[i % 2][i / 2 * 4 + 2 * kind + 1] * scale;
        pairs[i] = pack_pair(fp16(), a + b, a - b);
      }
      *reinterpret_cast<uint4*>(row + pair_column(chunk, kind)) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
};

// What a column is multiplied by, for the products and for what is added to them.
struct PairScales {
  PairChunk scale, shift;

  template <bool kVectors>
  __device__ void load(const PairRows& p, int64_t chunk) {
    PairChunk norm;
    load<kVectors>(norm, p.norm, chunk, p.K);
    load<kVectors>(scale, p.scale, chunk, p.K);
    load<kVectors>(shift, p.shift, chunk, p.K);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 8; ++i) scale.v[half][i] *= norm.v[half][i], shift.v[half][i] *= norm.v[half][i];
    }
  }

 private:
  template <bool kVectors>
  __device__ static void load(PairChunk& to, const float* from, int64_t chunk, int64_t K) {
    RawPairChunk<float> raw;
    if (from) raw.load<kVectors>(from, chunk, K);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 8; ++i) to.v[half][i] = from ? raw.v[half][i] : 1.0f;
    }
  }
};

struct PairSums {
  float most = 0.0f, plain = 0.0f, square = 0.0f;

  __device__ void add(const PairChunk& x) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        plain += x.v[half][i];
        most = fmaxf(most, fabsf(x.v[half][i]));
      }
    }
  }

  // Scales x.
  __device__ void add(PairChunk& x, const PairScales& of) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& v = x.v[half][i];
        square = fmaf(v, v, square);
        plain = fmaf(v, of.shift.v[half][i], plain);
        v *= of.scale.v[half][i];
        most = fmaxf(most, fabsf(v));
      }
    }
  }

  // Over the block; `scratch` may be written again after the next barrier but one.
  __device__ void reduce(float (&scratch)[3][32]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    most = warp_reduce(most, Max()), plain = warp_reduce(plain, Sum()), square = warp_reduce(square, Sum());
    if (lane == 0) scratch[0][warp] = most, scratch[1][warp] = plain, scratch[2][warp] = square;
    __syncthreads();
    const bool there = lane < static_cast<int>(blockDim.x) / 32;
    most = warp_reduce(there ? scratch[0][lane] : 0.0f, Max());
    plain = warp_reduce(there ? scratch[1][lane] : 0.0f, Sum());
    square = warp_reduce(there ? scratch[2][lane] : 0.0f, Sum());
  }

  // Powers of two, by which sums stay below 2^15 and are rounded as finely as fp16 can.
  __device__ float unit() const { return power(exponent() - 13); }
  __device__ float scale() const { return power(13 - exponent()); }

 private:
  __device__ int exponent() const { return max(static_cast<int>(__float_as_uint(most) >> 23) - 127, -112); }
  __device__ static float power(int of_two) { return __uint_as_float(static_cast<uint32_t>(127 + of_two) << 23); }
};

template <bool kScaled>
constexpr int kMostPairThreads = kScaled ? 512 : 1024;  // scales take registers

// A block a token, and then another. kHeld: what a thread holds of one stays in registers, and the scales of its
// columns; longer rows are read twice.
template <typename T, bool kVectors, bool kHeld, bool kScaled>
__global__ void __launch_bounds__(kMostPairThreads<kScaled>) pair_rows_kernel(const __grid_constant__ PairRows p) {
  __shared__ float scratch[2][3][32];
  const T* x = static_cast<const T*>(p.x);
  const int64_t chunks = p.pitch / kPairColumns, own = threadIdx.x;
  const bool works = own < chunks;
  PairScales of;
  PairChunk chunk;
  RawPairChunk<T> raw;
  if (kHeld && kScaled && works) of.load<kVectors>(p, own);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (kHeld && works) raw.template load<kVectors>(x + blockIdx.x * p.K, own, p.K);
  int turn = 0;
  for (int64_t m = blockIdx.x; m < p.M; m += gridDim.x, turn ^= 1) {
    const T* row = x + m * p.K;
    fp16* pairs = p.pairs + m * p.pitch;
    PairSums sums;
    const auto add = [&](PairSums& to) {
      if constexpr (kScaled)
        to.add(chunk, of);
      else
        to.add(chunk);
    };
    const auto load = [&](int64_t i) {
      if (kScaled) of.load<kVectors>(p, i);
      raw.template load<kVectors>(row, i, p.K);
      chunk.widen(raw);
    };
    if constexpr (kHeld) {
      chunk.widen(raw);
      if (works && m + gridDim.x < p.M) raw.template load<kVectors>(row + gridDim.x * p.K, own, p.K);
      if (works) add(sums);
    } else {
      for (int64_t i = own; i < chunks; i += blockDim.x) load(i), add(sums);
    }
    sums.reduce(scratch[turn]);
    if constexpr (kHeld) {
      if (works) chunk.store(pairs, own, sums.scale());
    } else {
      for (int64_t i = own; i < chunks; i += blockDim.x) {
        PairSums again;
        load(i), add(again);
        chunk.store(pairs, i, sums.scale());
      }
    }
    if (own == 0) {
      const float inverse = p.norm ? rsqrtf(sums.square / static_cast<float>(p.K) + p.eps) : 1.0f;
      p.tokens[m] = {__float_as_int(sums.plain * inverse), sums.unit() * inverse};
    }
  }
}

template <typename T, bool kScaled>
void launch_pair_rows(const PairRows& p, cudaStream_t stream) {
  constexpr int kMost = kMostPairThreads<kScaled>, kThreadsOfProcessor = kScaled ? 640 : 1024;
  const bool vectors =
      p.K % 8 == 0 && aligned(p.x, 16) && aligned(p.scale, 16) && aligned(p.shift, 16) && aligned(p.norm, 16);
  const int64_t chunks = p.pitch / kPairColumns, threads = std::min<int64_t>(ceil_div(chunks, 32) * 32, kMost);
  const bool held = chunks <= kMost;
  const auto kernel =
      held ? (vectors ? pair_rows_kernel<T, true, true, kScaled> : pair_rows_kernel<T, false, true, kScaled>)
           : (vectors ? pair_rows_kernel<T, true, false, kScaled> : pair_rows_kernel<T, false, false, kScaled>);
  const int64_t resident = std::max<int64_t>(1, kThreadsOfProcessor / threads);
  const int64_t blocks = std::min(p.M, resident * device_attribute(cudaDevAttrMultiProcessorCount));
  launch(kernel, Grid{dim3(static_cast<unsigned>(blocks)), static_cast<int>(threads), 0, true}, stream, p);
}

template <typename T>
void pair_rows(const PairRows& p, cudaStream_t stream) {
  p.scale || p.shift || p.norm ? launch_pair_rows<T, true>(p, stream) : launch_pair_rows<T, false>(p, stream);
}

}  // namespace bitkernels::cuda
