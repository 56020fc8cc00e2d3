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
  int64_t tokens;  // bytes of the workspace after them: one Token each
};

template <typename F>
ActivationRows activation_rows(const void* x, int64_t M, int64_t K) {
  constexpr int64_t kBoundary = 256;
  if (F::kInteger) {
    const int64_t pitch = ceil_div(K, 16) * 16;
    return {pitch, ceil_div(M * pitch, kBoundary) * kBoundary, M * int64_t(sizeof(Token))};
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

template <typename F>
int64_t warpgroup_workspace(const void* x, int64_t M, int64_t K) {
  const ActivationRows rows = activation_rows<F>(x, M, K);
  return rows.bytes + rows.tokens;
}

// Rows on 16-byte boundaries, from rows that are not.
template <typename T>
__global__ void __launch_bounds__(256) pad_rows_kernel(const T* x, T* padded, int64_t M, int64_t K, int64_t pitch) {
  let_next_kernel_start();
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= pitch) return;
  for (int64_t m = blockIdx.y; m < M; m += gridDim.y) padded[m * pitch + k] = k < K ? x[m * K + k] : T(0.0f);
}

// Per-token int8, in the order of TernaryInt8Operand: a block a token, which it reads twice.
template <typename T>
__global__ void __launch_bounds__(256)
    quantize_rows_kernel(const T* x, int8_t* rows, Token* tokens, int64_t K, int64_t pitch) {
  __shared__ float most_scratch[8];
  __shared__ int sum_scratch[8];
  let_next_kernel_start();
  const int64_t m = blockIdx.x;
  const T* row = x + m * K;
  float most = 0.0f;
  for (int64_t k = threadIdx.x; k < K; k += blockDim.x) most = fmaxf(most, fabsf(to_float(row[k])));
  const float scale = int8_scale(block_reduce(most, Max(), most_scratch));
  int sum = 0;
  for (int64_t i = threadIdx.x; i < pitch / 16; i += blockDim.x) {
    uint32_t words[4] = {};
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const int64_t k = 16 * i + e;
      const int8_t q = k < K ? to_int8(to_float(row[k]), scale) : int8_t(0);
      sum += q;
      words[e % 4] |= static_cast<uint32_t>(static_cast<uint8_t>(q)) << 8 * (e / 4);
    }
    reinterpret_cast<uint4*>(rows + m * pitch)[i] = {words[0], words[1], words[2], words[3]};
  }
  sum = block_reduce(sum, Sum(), sum_scratch);
  if (threadIdx.x == 0) tokens[m] = {scale, __int_as_float(sum), 0.0f};
}

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

// What a call is expected to take, in processor cycles, the launches included: tiles of int8 decode twice as many
// columns in a step, and quantise first.
template <typename F>
int64_t warpgroup_cycles(DType dtype, bool by_column, int64_t M, int64_t N, int64_t K) {
  constexpr int kLaunchCycles = 3000;
  constexpr int kQuantizeCycles = 3700;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t cycles = with_operand<F>(dtype, by_column, [&](auto operand, auto scales, auto) {
    return plan_tiles<typename decltype(operand)::type>(scales, M, N, K, processors).cycles;
  });
  return kLaunchCycles + (F::kInteger ? 2 * cycles + kQuantizeCycles : cycles);
}

template <class Operand, ScalesOf kScales, typename Out>
void run_plan(const void* x, int64_t pitch, const WarpgroupProblem& p, bool overlaps_previous, cudaStream_t stream) {
  const Plan plan = plan_tiles<Operand>(kScales, p.M, p.rows, p.K, device_attribute(cudaDevAttrMultiProcessorCount));
  with_tile<typename Operand::T>(plan.tile, [&](auto tile) {
    run_warpgroup<Operand, kScales, decltype(tile), Out>(x, pitch, p, plan.blocks, overlaps_previous, stream);
  });
}

template <typename F>
void run_warpgroup_forward(const TokenSource& s, const Weights& w, const Epilogue& e, void* workspace,
                           cudaStream_t stream) {
  const ActivationRows rows = activation_rows<F>(s.x, s.M, s.K);
  Token* tokens = reinterpret_cast<Token*>(static_cast<char*>(workspace) + rows.bytes);
  const bool by_column = s.scale != nullptr;
  const WarpgroupProblem p{
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
  };
  const void* x = s.x;
  const auto with_type = [&](auto t) {
    using T = decltype(t);
    if constexpr (F::kInteger) {
      x = workspace;
      launch(quantize_rows_kernel<T>, Grid{dim3(static_cast<unsigned>(s.M)), 256}, stream, static_cast<const T*>(s.x),
             static_cast<int8_t*>(workspace), tokens, s.K, rows.pitch);
      run_plan<TernaryInt8Operand, ScalesOf::kNothing, T>(x, rows.pitch, p, true, stream);
    } else {
      if (rows.bytes) {
        constexpr int kThreads = 256;
        constexpr int64_t kMostRows = 4096;
        x = workspace;
        launch(pad_rows_kernel<T>,
               Grid{dim3(blocks_for(rows.pitch, kThreads), blocks_for(s.M, 1, kMostRows)), kThreads}, stream,
               static_cast<const T*>(s.x), static_cast<T*>(workspace), s.M, s.K, rows.pitch);
      }
      const bool overlaps = rows.bytes > 0;
      if constexpr (F::kPerWord == TernaryOperand<T>::kPerWord) {
        run_plan<TernaryOperand<T>, ScalesOf::kNothing, T>(x, rows.pitch, p, overlaps, stream);
      } else if (by_column) {
        run_plan<SignOperand<T>, ScalesOf::kColumns, T>(x, rows.pitch, p, overlaps, stream);
      } else {
        run_plan<SignOperand<T>, ScalesOf::kRows, T>(x, rows.pitch, p, overlaps, stream);
      }
    }
  };
  s.dtype == DType::kBFloat16 ? with_type(bf16()) : with_type(fp16());
}

}  // namespace bitkernels::cuda
