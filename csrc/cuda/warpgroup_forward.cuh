// y = x times packed weights by the warpgroup kernel: what it takes, and what is made ready for it.
#pragma once

#include <type_traits>

#include "format.cuh"
#include "warpgroup_plan.cuh"

namespace bitkernels::cuda {

// Rows of activations that the copy engine can read.
struct ActivationRows {
  int64_t pitch;   // elements
  int64_t bytes;   // of the workspace that holds them; 0: the caller's are read in place
  int64_t tokens;  // bytes of the workspace after them: one Int8Token each
};

template <typename F>
ActivationRows activation_rows(const void* x, int64_t M, int64_t K) {
  constexpr int64_t kBoundary = 256;
  if (F::kInteger) {
    const int64_t pitch = ceil_div(K, 16) * 16;
    return {pitch, ceil_div(M * pitch, kBoundary) * kBoundary,
            ceil_div(M * int64_t(sizeof(Int8Token)), kBoundary) * kBoundary};
  }
  if (K % 8 == 0 && aligned(x, 16)) return {K, 0, 0};
  const int64_t pitch = ceil_div(K, 8) * 8;
  return {pitch, ceil_div(M * pitch * 2, kBoundary) * kBoundary, 0};
}

// Activations and outputs of 16 bits; a table of column scales that leaves room for a tile.
inline bool warpgroup_applies(DType dtype, int64_t K, bool by_column) {
  constexpr int64_t kMostTabulated = 16384;
  return (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && K > 0 && (!by_column || K <= kMostTabulated) &&
         on_hopper();
}

// Rows on 16-byte boundaries, from rows that are not.
template <typename T>
__global__ void __launch_bounds__(256) pad_rows_kernel(const T* x, T* padded, int64_t M, int64_t K, int64_t pitch) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= pitch) return;
  for (int64_t m = blockIdx.y; m < M; m += gridDim.y) padded[m * pitch + k] = k < K ? x[m * K + k] : T(0.0f);
}

// Elements 16 i to 16 i + 15 of a row, zeros beyond its end.
template <bool kVectors, typename T>
__device__ void load_sixteen(const T* row, int64_t i, int64_t K, T (&v)[16]) {
  if constexpr (kVectors) {
    uint4 halves[2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (16 * i + 8 * h < K) halves[h] = reinterpret_cast<const uint4*>(row)[2 * i + h];
    }
    memcpy(v, halves, sizeof(v));
  } else {
#pragma unroll
    for (int e = 0; e < 16; ++e) v[e] = 16 * i + e < K ? row[16 * i + e] : from_float<T>(0.0f);
  }
}

// Per-token int8, in the order of TernaryInt8Operand: a block a token, the elements it sees last stay in registers.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(256) quantize_rows_kernel(const T* x, const float* weight_scale, int8_t* rows,
                                                            Int8Token* tokens, int64_t K, int64_t pitch) {
  __shared__ float most_scratch[8];
  __shared__ int sum_scratch[8];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t m = blockIdx.x;
  const T* row = x + m * K;
  const int64_t count = pitch / 16;
  T v[16];
  float most = 0.0f;
  int64_t last = -1;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    last = i;
    load_sixteen<kVectors>(row, i, K, v);
#pragma unroll
    for (int e = 0; e < 16; ++e) most = fmaxf(most, fabsf(to_float(v[e])));
  }
  const float scale = int8_scale(block_reduce(most, Max(), most_scratch));
  int sum = 0;
  for (int64_t i = last; i >= 0; i -= blockDim.x) {
    if (i != last) load_sixteen<kVectors>(row, i, K, v);
    uint32_t words[4] = {};
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const int8_t q = to_int8(to_float(v[e]), scale);
      sum += q;
      words[e % 4] |= static_cast<uint32_t>(static_cast<uint8_t>(q)) << 8 * (e / 4);
    }
    reinterpret_cast<uint4*>(rows + m * pitch)[i] = {words[0], words[1], words[2], words[3]};
  }
  sum = block_reduce(sum, Sum(), sum_scratch);
  if (threadIdx.x == 0) tokens[m] = {sum, __fdiv_rn(*weight_scale, scale)};
}

inline int processor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }

template <ScalesOf kScales>
using constant_of = std::integral_constant<ScalesOf, kScales>;

// Calls f with the operand that weights become, what their scales follow and the type of activations and outputs.
template <typename F, typename Function>
auto with_operand(DType dtype, bool by_column, Function&& f) {
  using std::type_identity;
  const auto with_type = [&](auto t) {
    using T = decltype(t);
    if constexpr (F::kInteger) {
      return f(type_identity<TernaryInt8Operand>(), constant_of<ScalesOf::kNothing>(), t);
    } else if constexpr (F::kPerWord == TernaryOperand<T>::kPerWord) {
      return f(type_identity<TernaryOperand<T>>(), constant_of<ScalesOf::kNothing>(), t);
    } else {
      if (by_column) return f(type_identity<SignOperand<T>>(), constant_of<ScalesOf::kColumns>(), t);
      return f(type_identity<SignOperand<T>>(), constant_of<ScalesOf::kRows>(), t);
    }
  };
  return dtype == DType::kBFloat16 ? with_type(bf16()) : with_type(fp16());
}

// What a call is expected to take, in processor cycles, the launches included; int8 activations are quantised first.
template <typename F>
int64_t warpgroup_cycles(DType dtype, bool by_column, int64_t M, int64_t N, int64_t K) {
  constexpr int kLaunchCycles = 1500;
  constexpr int kQuantizeCycles = 3700;
  const int64_t cycles = with_operand<F>(dtype, by_column, [&](auto operand, auto scales, auto) {
    return plan_tiles<typename decltype(operand)::type>(scales, M, N, K, processor_count()).cycles;
  });
  return kLaunchCycles + cycles + (F::kInteger ? kQuantizeCycles : 0);
}

template <typename F>
int64_t warpgroup_workspace(const void* x, DType dtype, bool by_column, int64_t M, int64_t N, int64_t K) {
  const ActivationRows rows = activation_rows<F>(x, M, K);
  const int64_t partial = with_operand<F>(dtype, by_column, [&](auto operand, auto scales, auto) {
    using Operand = typename decltype(operand)::type;
    const Plan plan = plan_tiles<Operand>(scales, M, N, K, processor_count());
    return with_tile<typename Operand::T>(
        plan.tile, [&](auto tile) { return plan.cut.tiles ? partial_bytes<decltype(tile)>(processor_count()) : 0; });
  });
  return rows.bytes + rows.tokens + partial;
}

template <class Operand, ScalesOf kScales, typename Out>
void run_plan(const void* x, int64_t pitch, const WarpgroupProblem& p, void* partials, cudaStream_t stream) {
  const Plan plan = plan_tiles<Operand>(kScales, p.M, p.rows, p.K, processor_count());
  with_tile<typename Operand::T>(plan.tile, [&](auto tile) {
    run_warpgroup<Operand, kScales, decltype(tile), Out>(x, pitch, p, plan.blocks, plan.cut, partials, stream);
  });
}

template <typename F>
void run_warpgroup_forward(const TokenSource& s, const Weights& w, const Epilogue& e, void* workspace,
                           cudaStream_t stream) {
  const ActivationRows rows = activation_rows<F>(s.x, s.M, s.K);
  Int8Token* tokens = reinterpret_cast<Int8Token*>(static_cast<char*>(workspace) + rows.bytes);
  void* partials = static_cast<char*>(workspace) + rows.bytes + rows.tokens;
  const bool by_column = s.scale != nullptr;
  const WarpgroupProblem p{
      .x = nullptr,
      .x_bytes = 0,
      .w = w.packed,
      .alpha = by_column ? s.scale : e.scale,
      .beta = by_column ? s.shift : e.shift,
      .bias = e.bias,
      .tokens = tokens,
      .y = e.out,
      .rows = w.rows,
      .words = w.words,
      .M = s.M,
      .K = s.K,
      .scale_stride = static_cast<int>(e.stride),
      .aligned_words = w.vector,
      .boxed_output = false,
      .row_tiles = 0,
      .tiles = 0,
      .cut = {},
      .partials = nullptr,
      .filled = nullptr,
  };
  const void* x = s.x;
  const auto with_type = [&](auto t) {
    using T = decltype(t);
    if constexpr (F::kInteger) {
      x = workspace;
      const bool vectors = s.K % 8 == 0 && aligned(s.x, 16);
      const int threads = static_cast<int>(std::min<int64_t>(256, ceil_div(rows.pitch / 16, 32) * 32));
      launch(vectors ? quantize_rows_kernel<T, true> : quantize_rows_kernel<T, false>,
             Grid{dim3(static_cast<unsigned>(s.M)), threads, 0, true}, stream, static_cast<const T*>(s.x), e.scale,
             static_cast<int8_t*>(workspace), tokens, s.K, rows.pitch);
      run_plan<TernaryInt8Operand, ScalesOf::kNothing, T>(x, rows.pitch, p, partials, stream);
    } else {
      if (rows.bytes) {
        constexpr int kThreads = 256;
        constexpr int64_t kMostRows = 4096;
        x = workspace;
        launch(pad_rows_kernel<T>,
               Grid{dim3(blocks_for(rows.pitch, kThreads), blocks_for(s.M, 1, kMostRows)), kThreads, 0, true}, stream,
               static_cast<const T*>(s.x), static_cast<T*>(workspace), s.M, s.K, rows.pitch);
      }
      if constexpr (F::kPerWord == TernaryOperand<T>::kPerWord) {
        run_plan<TernaryOperand<T>, ScalesOf::kNothing, T>(x, rows.pitch, p, partials, stream);
      } else if (by_column) {
        run_plan<SignOperand<T>, ScalesOf::kColumns, T>(x, rows.pitch, p, partials, stream);
      } else {
        run_plan<SignOperand<T>, ScalesOf::kRows, T>(x, rows.pitch, p, partials, stream);
      }
    }
  };
  s.dtype == DType::kBFloat16 ? with_type(bf16()) : with_type(fp16());
}

}  // namespace bitkernels::cuda
