// y = x times packed weights by the warpgroup kernel: what it takes, and what is made ready for it.
#pragma once

#include <type_traits>

#include "format.cuh"
#include "pair_rows.cuh"
#include "warpgroup_plan.cuh"

namespace bitkernels::cuda {

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

struct Product {
  DType dtype;
  bool by_column;
  int64_t M, N, K;
};

template <class Operand>
Plan plan_of(ScalesOf scales, const Product& q) {
  return plan_tiles<Operand>(scales, q.M, q.N, q.K, processor_count());
}

// What a call is expected to take, in processor cycles, the launches included; activations of bytes or pairs are made
// by a kernel before, as are copies of rows that the copy engine cannot read.
template <class Operand>
int64_t cycles_of(ScalesOf scales, const Product& q) {
  constexpr int kLaunchCycles = 1500;
  constexpr int kQuantizeCycles = 3700;
  constexpr int kRewriteCycles = 4000;
  constexpr int64_t kRewrittenPerCycle = 500;  // elements
  const bool rewrites = std::is_same_v<Operand, PairOperand> || q.K % 8 != 0;
  const int64_t before = std::is_same_v<Operand, TernaryInt8Operand> ? kQuantizeCycles
                         : rewrites                                  ? kRewriteCycles + q.M * q.K / kRewrittenPerCycle
                                                                     : 0;
  return kLaunchCycles + before + plan_of<Operand>(scales, q).cycles;
}

template <typename T>
bool pairs_pay(const Product& q) {
  const ScalesOf scales = q.by_column ? ScalesOf::kColumns : ScalesOf::kRows;
  return cycles_of<PairOperand>(ScalesOf::kNothing, q) < cycles_of<SignOperand<T>>(scales, q);
}

template <ScalesOf kScales>
using constant_of = std::integral_constant<ScalesOf, kScales>;

// Calls f with the operand that weights become, what its values follow and the type of activations and outputs.
template <typename F, typename Function>
auto with_operand(const Product& q, Function&& f) {
  using std::type_identity;
  const auto with_type = [&](auto t) {
    using T = decltype(t);
    if constexpr (F::kInteger) {
      return f(type_identity<TernaryInt8Operand>(), constant_of<ScalesOf::kNothing>(), t);
    } else if constexpr (F::kPerWord == TernaryOperand<T>::kPerWord) {
      return f(type_identity<TernaryOperand<T>>(), constant_of<ScalesOf::kNothing>(), t);
    } else {
      if (pairs_pay<T>(q)) return f(type_identity<PairOperand>(), constant_of<ScalesOf::kNothing>(), t);
      if (q.by_column) return f(type_identity<SignOperand<T>>(), constant_of<ScalesOf::kColumns>(), t);
      return f(type_identity<SignOperand<T>>(), constant_of<ScalesOf::kRows>(), t);
    }
  };
  return q.dtype == DType::kBFloat16 ? with_type(bf16()) : with_type(fp16());
}

template <typename F>
int64_t warpgroup_cycles(const Product& q) {
  return with_operand<F>(
      q, [&](auto operand, auto scales, auto) { return cycles_of<typename decltype(operand)::type>(scales, q); });
}

// Rows of activations that the copy engine can read.
struct ActivationRows {
  int64_t pitch;   // elements
  int64_t bytes;   // of the workspace that holds them; 0: the caller's are read in place
  int64_t tokens;  // bytes of the workspace after them: one Int8Token each
};

template <class Operand>
ActivationRows activation_rows(const void* x, int64_t M, int64_t K) {
  constexpr bool kMade = std::is_same_v<Operand, TernaryInt8Operand> || std::is_same_v<Operand, PairOperand>;
  constexpr int64_t kColumns = std::is_same_v<Operand, TernaryInt8Operand> ? 16 : kMade ? kSignsPerWord : 8;
  const auto bytes = [](int64_t count) { return ceil_div(count, 256) * 256; };
  const int64_t pitch = ceil_div(K, kColumns) * kColumns;
  if (!kMade && pitch == K && aligned(x, 16)) return {K, 0, 0};
  return {pitch, bytes(M * pitch * int64_t(sizeof(typename Operand::T))),
          kMade ? bytes(M * int64_t(sizeof(Int8Token))) : 0};
}

template <typename F>
int64_t warpgroup_workspace(const void* x, const Product& q) {
  return with_operand<F>(q, [&](auto operand, auto scales, auto) {
    using Operand = typename decltype(operand)::type;
    const ActivationRows rows = activation_rows<Operand>(x, q.M, q.K);
    const Plan plan = plan_of<Operand>(scales, q);
    const int64_t partial = with_tile<Operand>(
        plan.tile, [&](auto tile) { return plan.cut.tiles ? partial_bytes<decltype(tile)>(processor_count()) : 0; });
    return rows.bytes + rows.tokens + partial;
  });
}

inline WarpgroupProblem warpgroup_problem(const Weights& w, const Epilogue& e, const Int8Token* tokens, int64_t M,
                                          int64_t K) {
  WarpgroupProblem p{};
  p.w = w.packed;
  p.alpha = e.scale;
  p.beta = e.shift;
  p.bias = e.bias;
  p.tokens = tokens;
  p.y = e.out;
  p.rows = w.rows;
  p.words = w.words;
  p.M = M;
  p.K = K;
  p.scale_stride = static_cast<int>(e.stride);
  p.aligned_words = w.vector;
  return p;
}

// The product of pairs, of activations of type X, to which an RMSNorm is applied before where `norm` is given.
template <typename X, typename T>
void run_pairs(const void* x, const float* norm, float eps, const TokenSource& s, const Weights& w, const Epilogue& e,
               void* workspace, cudaStream_t stream) {
  const Product q{s.dtype, s.scale != nullptr, s.M, w.rows, s.K};
  const ActivationRows rows = activation_rows<PairOperand>(x, s.M, s.K);
  Int8Token* tokens = reinterpret_cast<Int8Token*>(static_cast<char*>(workspace) + rows.bytes);
  pair_rows<X>({x, s.scale, s.shift, norm, eps, static_cast<fp16*>(workspace), tokens, s.M, s.K, rows.pitch}, stream);
  const WarpgroupProblem p = warpgroup_problem(w, e, tokens, s.M, s.K);
  const Plan plan = plan_of<PairOperand>(ScalesOf::kNothing, q);
  with_tile<PairOperand>(plan.tile, [&](auto tile) {
    run_warpgroup<PairOperand, ScalesOf::kNothing, decltype(tile), T>(
        workspace, rows.pitch, p, plan.blocks, plan.cut, static_cast<char*>(workspace) + rows.bytes + rows.tokens,
        stream);
  });
}

template <typename F>
void run_warpgroup_forward(const TokenSource& s, const Weights& w, const Epilogue& e, void* workspace,
                           cudaStream_t stream) {
  const Product q{s.dtype, s.scale != nullptr, s.M, w.rows, s.K};
  with_operand<F>(q, [&](auto operand, auto scales, auto t) {
    using Operand = typename decltype(operand)::type;
    using T = decltype(t);
    if constexpr (std::is_same_v<Operand, PairOperand>) {
      run_pairs<T, T>(s.x, nullptr, 0.0f, s, w, e, workspace, stream);
    } else {
      const ActivationRows rows = activation_rows<Operand>(s.x, s.M, s.K);
      Int8Token* tokens = reinterpret_cast<Int8Token*>(static_cast<char*>(workspace) + rows.bytes);
      void* partials = static_cast<char*>(workspace) + rows.bytes + rows.tokens;
      WarpgroupProblem p = warpgroup_problem(w, e, tokens, s.M, s.K);
      if (q.by_column) p.alpha = s.scale, p.beta = s.shift;
      if constexpr (F::kInteger) {
        const bool vectors = s.K % 8 == 0 && aligned(s.x, 16);
        const int threads = static_cast<int>(std::min<int64_t>(256, ceil_div(rows.pitch / 16, 32) * 32));
        launch(vectors ? quantize_rows_kernel<T, true> : quantize_rows_kernel<T, false>,
               Grid{dim3(static_cast<unsigned>(s.M)), threads, 0, true}, stream, static_cast<const T*>(s.x), e.scale,
               static_cast<int8_t*>(workspace), tokens, s.K, rows.pitch);
      } else if (rows.bytes) {
        constexpr int kThreads = 256;
        constexpr int64_t kMostRows = 4096;
        launch(pad_rows_kernel<T>,
               Grid{dim3(blocks_for(rows.pitch, kThreads), blocks_for(s.M, 1, kMostRows)), kThreads, 0, true}, stream,
               static_cast<const T*>(s.x), static_cast<T*>(workspace), s.M, s.K, rows.pitch);
      }
      const Plan plan = plan_of<Operand>(scales, q);
      with_tile<Operand>(plan.tile, [&](auto tile) {
        run_warpgroup<Operand, scales, decltype(tile), T>(rows.bytes ? workspace : s.x, rows.pitch, p, plan.blocks,
                                                          plan.cut, partials, stream);
      });
    }
  });
}

}  // namespace bitkernels::cuda
