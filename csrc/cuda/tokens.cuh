// Activations made ready for the tensor cores: scaled, narrowed, and in the order of the fragments.
//
// fp16 formats: v = scale * x is divided by a power of two of its row, so that |v| < 64, and rounded to
// fp16: 11 bits, more than bf16 has, down to 2^-31 of the row's largest element. fp32 activations become
// two fp16 rows of fixed point, 11 and 12 bits below the row's largest element: the tensor cores add up to
// 8192 such products exactly, however they round.
//
// Layout, in 16-byte chunks: [unit][group of 8 rows][chunk of the word][lane], so a warp reads the operand
// of two mma steps as 512 consecutive bytes. Columns past K are zero, so nothing else needs to mask them.
#pragma once

#include "format.cuh"
#include "int8.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "types.cuh"

namespace bitkernels::cuda {

constexpr int kRowsPerGroup = 8;

// What one unit of the second fp16 row of an fp32 activation is worth.
constexpr float kSecondLimb = 1.0f / 4096.0f;

// value = weight scale * (accumulated * scale - sum) + weight shift * plain
struct Token {
  float scale;  // int8: the activation scale
  float sum;    // of the prepared activations; int8: the bits of an int
  float plain;  // sum of shift * x
};

struct TokenSource {
  const void* x;       // [M, K] dtype
  const float* scale;  // [K] by stride; null: 1
  const float* shift;  // as scale
  int64_t stride;
  bool has_plain;
  DType dtype;
  int64_t M, K;
};

struct Prepared {
  uint4* chunks;   // [units][groups][F::kChunks][32]
  Token* tokens;   // [M]
  int64_t units;   // of four words; whole pieces
  int64_t groups;  // of 8 rows
  int64_t rows;    // M, or 2 M for fp32
};

template <typename F>
Prepared prepared(int64_t M, int64_t K, DType dtype, void* workspace) {
  Prepared p;
  p.units = ceil_div(ceil_div(K, F::kPerWord), kWordsPerPiece) * kUnitsPerPiece;
  p.rows = dtype == DType::kFloat32 && !F::kInteger ? 2 * M : M;
  p.groups = ceil_div(p.rows, kRowsPerGroup);
  p.chunks = static_cast<uint4*>(workspace);
  p.tokens = reinterpret_cast<Token*>(p.chunks + p.units * p.groups * F::kChunks * 32);
  return p;
}

template <typename F>
int64_t prepared_bytes(int64_t M, int64_t K, DType dtype) {
  const Prepared p = prepared<F>(M, K, dtype, nullptr);
  return ceil_div(reinterpret_cast<int64_t>(p.tokens + M), 256) * 256;
}

inline bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Elements k .. k + 3 of a row, zero past K.
template <typename T>
__device__ void load4(const T* row, int64_t k, int64_t K, bool vector, float (&v)[4]) {
  struct alignas(4 * sizeof(T)) Four {
    T e[4];
  };
  if (vector && k + 4 <= K) {
    const Four four = *reinterpret_cast<const Four*>(row + k);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = to_float(four.e[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = k + e < K ? to_float(row[k + e]) : 0.0f;
  }
}

__device__ inline void multiply4(const float* factors, int64_t stride, int64_t k, int64_t K, bool vector,
                                 float (&v)[4]) {
  if (!factors) return;
  float f[4] = {factors[0], factors[0], factors[0], factors[0]};
  if (stride) load4(factors, k, K, vector, f);
#pragma unroll
  for (int e = 0; e < 4; ++e) v[e] *= f[e];
}

// The exponent e that brings absmax / 2^e into [32, 64), kept where both 2^e and 2^-e are normal.
__device__ inline int row_exponent(float absmax) {
  constexpr int kBias = 127;
  const int exponent = static_cast<int>(__float_as_uint(absmax) >> 23) - kBias - 5;
  return max(exponent, -120);
}

__device__ inline float power_of_two(int e) { return __int_as_float((e + 127) << 23); }

// One block a token; blocks past M fill the last group of rows with zeros.
template <typename F, typename T>
__global__ void __launch_bounds__(512) prepare_kernel(TokenSource s, Prepared p, bool vector) {
  using Order = ChunkOrder<F>;
  using Sums = typename F::Accumulator;
  __shared__ float scratch[32];
  __shared__ Sums sum_scratch[32];
  let_next_kernel_start();

  const int64_t m = blockIdx.x;
  const bool inside = m < s.M;
  const T* row = static_cast<const T*>(s.x) + m * s.K;

  float most = 0.0f;
  float plain = 0.0f;
  for (int64_t k = 4 * threadIdx.x; inside && k < s.K; k += 4 * blockDim.x) {
    float x[4];
    load4(row, k, s.K, vector, x);
    float v[4] = {x[0], x[1], x[2], x[3]};
    multiply4(s.scale, s.stride, k, s.K, vector, v);
    if (s.has_plain) multiply4(s.shift, s.stride, k, s.K, vector, x);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      most = fmaxf(most, fabsf(v[e]));
      plain += x[e];
    }
  }
  most = block_reduce(most, Max(), scratch);
  plain = s.has_plain ? block_reduce(plain, Sum(), scratch) : 0.0f;

  const int exponent = row_exponent(most);
  const float down = F::kInteger ? int8_scale(most) : power_of_two(-exponent);
  const int limbs = static_cast<int>(p.rows / s.M);
  Sums sum = 0;
  const int64_t chunks = p.units * 4 * F::kChunks;
  for (int64_t i = threadIdx.x; i < chunks; i += blockDim.x) {
    const int64_t word = i / F::kChunks;
    const int q = static_cast<int>(i % F::kChunks);
    uint32_t out[2][4] = {};
#pragma unroll
    for (int r = 0; r < F::kRuns; ++r) {
      const int64_t k = word * F::kPerWord + Order::first(q, r);
      float v[4] = {};
      if (inside) {
        load4(row, k, s.K, vector, v);
        multiply4(s.scale, s.stride, k, s.K, vector, v);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int reg = Order::reg(r, e);
        const int slot = Order::slot(r, e);
        if constexpr (F::kInteger) {
          const int8_t rounded = to_int8(v[e], down);
          sum += rounded;
          out[0][reg] |= static_cast<uint32_t>(static_cast<uint8_t>(rounded)) << 8 * slot;
        } else {
          const int plane = F::plane(4 * q + reg);
          const float up = power_of_two(9 - plane);
          const float whole = v[e] * down;
          // Fixed point in steps of 1/32 where there is a second limb to take what is left.
          const float high = limbs == 2 ? rintf(whole * 32.0f) / 32.0f : whole;
          const fp16 first = __float2half_rn(high * up);
          out[0][reg] |= static_cast<uint32_t>(__half_as_ushort(first)) << 16 * slot;
          sum += __half2float(first) / up;
          if (limbs == 2) {
            const float low = rintf((whole - high) / kSecondLimb * 32.0f) / 32.0f;
            out[1][reg] |= static_cast<uint32_t>(__half_as_ushort(__float2half_rn(low * up))) << 16 * slot;
            sum += low * kSecondLimb;
          }
        }
      }
    }
#pragma unroll
    for (int limb = 0; limb < 2; ++limb) {
      const int64_t to = m * limbs + limb;
      const int64_t group = to / kRowsPerGroup;
      const int lane = static_cast<int>(to % kRowsPerGroup) * 4 + F::quad_lane(word);
      if (limb < limbs && group < p.groups) {
        const uint32_t (&c)[4] = out[limb];
        p.chunks[((F::unit(word) * p.groups + group) * F::kChunks + q) * 32 + lane] = {c[0], c[1], c[2], c[3]};
      }
    }
  }
  sum = block_reduce(sum, Sum(), sum_scratch);
  if (threadIdx.x == 0 && inside) {
    Token token;
    if constexpr (F::kInteger) {
      token = {down, __int_as_float(sum), plain};
    } else {
      token = {F::kStep / kProductScale * power_of_two(exponent), sum * power_of_two(exponent), plain};
    }
    p.tokens[m] = token;
  }
}

template <typename F>
void prepare_tokens(const TokenSource& s, const Prepared& p, cudaStream_t stream) {
  const int64_t rows_per_token = p.rows / s.M;
  const Grid grid{dim3(static_cast<unsigned>(ceil_div(p.groups * kRowsPerGroup, rows_per_token))),
                  s.M > 64 ? 256 : 512};
  dispatch_float(s.dtype, [&](auto t) {
    const bool vector = s.K % 4 == 0 && aligned(s.x, 4 * sizeof(t)) && aligned(s.scale, 16) && aligned(s.shift, 16);
    launch(prepare_kernel<F, decltype(t)>, grid, stream, s, p, vector);
  });
}

}  // namespace bitkernels::cuda
