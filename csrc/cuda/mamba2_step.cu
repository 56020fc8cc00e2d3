// What lies on either side of the state in a decode step of the Mamba-2 block. A few tokens take one kernel on Hopper;
// elsewhere the parts run one after the other.
#include <algorithm>

#include "bit_cluster_launch.cuh"
#include "mixer_kernels.h"
#include "packed_linear.h"
#include "reduce.cuh"
#include "warpgroup_forward.cuh"

namespace bitkernels::cuda {
namespace {

constexpr int kNormThreads = 256;

template <bool kVector, typename T>
__device__ void store_eight(T* to, int64_t left, const float (&v)[8]) {
  if constexpr (kVector && sizeof(T) == 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = bits_of(from_float<T>(v[2 * i])) | bits_of(from_float<T>(v[2 * i + 1])) << 16;
    store_vector(to, words);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < left) to[i] = from_float<T>(v[i]);
    }
  }
}

// out[M, K] = x / rms(x) * weight; a block a row, eight neighbours a thread. kVector: rows are whole vectors.
template <typename X, typename T, bool kVector>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(const X* x, const float* weight, T* out, int K, float eps) {
  __shared__ float scratch[kNormThreads / 32];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const X* row = x + int64_t(blockIdx.x) * K;
  float squares = 0.0f;
  Run<8, X> run;
  for (int k = 8 * threadIdx.x; k < K; k += 8 * kNormThreads) {
    run.template load<kVector>(row, k, K);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(run[i], run[i], squares);
  }
  const float inverse = rsqrtf(block_reduce(squares, Sum(), scratch) / static_cast<float>(K) + eps);
  for (int k = 8 * threadIdx.x; k < K; k += 8 * kNormThreads) {
    run.template load<kVector>(row, k, K);
    Run<8, float> scale;
    scale.template load<kVector>(weight, k, K);
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = run[i] * inverse * scale[i];
    store_eight<kVector>(out + int64_t(blockIdx.x) * K + k, K - k, v);
  }
}

// Any number of taps, one after the other.
__device__ float step_long_convolution(const ConvStep& p, int64_t request, int64_t channel, float v) {
  const int64_t slot = slot_of(p.state_indices, p.slots, request);
  const int64_t at = slot * p.state_batch + channel;
  float sum = p.bias ? static_cast<const float*>(p.bias)[channel] : 0.0f;
  for (int64_t w = 0; w < p.W; ++w) {
    float input = w + 1 < p.W ? 0.0f : v;
    if (w + 1 < p.W && slot >= 0) input = load(p.state, p.state_dtype, at + w * p.state_row);
    if (w > 0 && slot >= 0) store(p.state, p.state_dtype, at + (w - 1) * p.state_row, input);
    sum = fmaf(input, static_cast<const float*>(p.weight)[channel * p.W + w], sum);
  }
  return silu(sum);
}

template <typename T>
__global__ void __launch_bounds__(kNormThreads) conv_kernel(T* y, int64_t columns, ConvStep p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t channel = int64_t(blockIdx.x) * kNormThreads + threadIdx.x;
  if (channel >= p.channels) return;
  T* at = y + blockIdx.y * columns + p.first + channel;
  const float v = to_float(*at);
  *at = from_float<T>(p.W > kMostTaps ? step_long_convolution(p, blockIdx.y, channel, v)
                                      : step_convolution(p, conv_column(p, blockIdx.y, p.first + channel), v));
}

// Four taps of four neighbouring channels, of kConvRequests requests whose inputs are all under way at once.
constexpr int kConvThreads = 128;
constexpr int kConvWidth = 4;
constexpr int kConvRequests = 4;

template <typename T>
__device__ void store_four(T* to, const float (&v)[kConvWidth]) {
  uint32_t words[Run<kConvWidth, T>::kRegisters];
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      words[i] = bits_of(from_float<T>(v[2 * i])) | bits_of(from_float<T>(v[2 * i + 1])) << 16;
  }
  store_vector(to, words);
}

template <typename T, typename S>
__global__ void __launch_bounds__(kConvThreads)
    conv_vectors_kernel(T* y, int64_t columns, int64_t requests, ConvStep p) {
  let_next_kernel_start();
  const int64_t channel = kConvWidth * (int64_t(blockIdx.x) * kConvThreads + threadIdx.x);
  const int64_t first = int64_t(blockIdx.y) * kConvRequests;
  if (channel >= p.channels) return;
  S* state = static_cast<S*>(p.state) + channel;
  const auto slot = [&](int r) { return first + r < requests ? slot_of(p.state_indices, p.slots, first + r) : -1; };
  // The slots may still change, and then the prefetch was in vain.
  constexpr int kLine = 128 / sizeof(S);
  if (channel % kLine == 0) {
#pragma unroll
    for (int r = 0; r < kConvRequests; ++r) {
      const int64_t at = slot(r);
#pragma unroll
      for (int w = 0; w + 1 < kMostTaps; ++w) {
        if (at >= 0) prefetch_to_l2(state + at * p.state_batch + w * p.state_row);
      }
    }
  }
  wait_for_previous_kernel();

  S* own[kConvRequests];  // of requests that have a state
  Run<kConvWidth, S> history[kConvRequests][kMostTaps - 1];
  Run<kConvWidth, T> input[kConvRequests];
  T* const outputs = y + first * columns + p.first + channel;
#pragma unroll
  for (int r = 0; r < kConvRequests; ++r) {
    const int64_t at = slot(r);
    own[r] = at >= 0 ? state + at * p.state_batch : nullptr;
    input[r].template load<true>(outputs + r * columns, 0, first + r < requests ? kConvWidth : 0);
#pragma unroll
    for (int w = 0; w + 1 < kMostTaps; ++w) {
      history[r][w].template load<true>(own[r] + w * p.state_row, 0, own[r] ? kConvWidth : 0);
    }
  }
  Run<kMostTaps, float> weight[kConvWidth];  // of a channel
  Run<kConvWidth, float> bias;
  const float* weights = static_cast<const float*>(p.weight) + channel * kMostTaps;
#pragma unroll
  for (int c = 0; c < kConvWidth; ++c) weight[c].template load<true>(weights, c * kMostTaps, (c + 1) * kMostTaps);
  bias.template load<true>(static_cast<const float*>(p.bias) + channel, 0, p.bias ? kConvWidth : 0);

#pragma unroll
  for (int r = 0; r < kConvRequests; ++r) {
    if (first + r >= requests) break;
    float newest[kConvWidth], out[kConvWidth];
#pragma unroll
    for (int c = 0; c < kConvWidth; ++c) {
      newest[c] = input[r][c];
      float sum = bias[c];
#pragma unroll
      for (int w = 0; w + 1 < kMostTaps; ++w) sum = fmaf(history[r][w][c], weight[c][w], sum);
      out[c] = silu(fmaf(newest[c], weight[c][kMostTaps - 1], sum));
    }
    store_four(outputs + r * columns, out);
    if (!own[r]) continue;
#pragma unroll
    for (int w = 0; w + 2 < kMostTaps; ++w) store_vector(own[r] + w * p.state_row, history[r][w + 1].r);
    store_four(own[r] + (kMostTaps - 2) * p.state_row, newest);
  }
}

// Whether every run of four channels lies on its boundary.
bool conv_vectors(const ConvStep& p, const void* y, int64_t columns) {
  bool whole =
      p.W == kMostTaps && aligned(y, 16) && aligned(p.state, 16) && aligned(p.weight, 16) && aligned(p.bias, 16);
  for (int64_t n : {columns, p.first, p.channels, p.state_batch, p.state_row}) whole = whole && n % kConvWidth == 0;
  return whole;
}

template <typename T>
void run_convolution(T* y, const PackedLinear& linear, const ConvStep& p, cudaStream_t stream) {
  const auto blocks = [&](int64_t channels, int64_t requests) {
    return dim3(static_cast<unsigned>(ceil_div(p.channels, channels)),
                static_cast<unsigned>(ceil_div(linear.M, requests)));
  };
  if (p.channels == 0) return;
  if (!conv_vectors(p, y, linear.N)) {
    launch(conv_kernel<T>, step_grid(blocks(kNormThreads, 1), kNormThreads), stream, y, linear.N, p);
    return;
  }
  dispatch_float(p.state_dtype, [&](auto s) {
    launch(conv_vectors_kernel<T, decltype(s)>,
           step_grid(blocks(kConvThreads * kConvWidth, kConvRequests), kConvThreads), stream, y, linear.N, linear.M, p);
  });
}

template <typename T>
__global__ void __launch_bounds__(kNormThreads) add_kernel(float* residual, const T* y, int64_t count) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t i = int64_t(blockIdx.x) * kNormThreads + threadIdx.x;
  if (i < count) residual[i] += to_float(y[i]);
}

struct Scales {
  TokenSource source;
  Epilogue epilogue;
};

// Column scales belong to the activations; row and single scales to the output.
Scales scales(const PackedLinear& p, DType dtype_of_x) {
  const float* alpha = static_cast<const float*>(p.alpha);
  const float* beta = static_cast<const float*>(p.beta);
  Scales s{{p.x, nullptr, nullptr, 1, true, dtype_of_x, p.M, p.K},
           {nullptr, nullptr, p.axis == ScaleAxis::kRow ? 1 : 0, static_cast<const float*>(p.bias), p.y, p.dtype, p.N}};
  (p.axis == ScaleAxis::kColumn ? s.source.scale : s.epilogue.scale) = alpha;
  (p.axis == ScaleAxis::kColumn ? s.source.shift : s.epilogue.shift) = beta;
  return s;
}

// Two to eight tokens of bf16: a cluster's blocks split K. Calls with another number of tokens have another plan.
template <BlockStep kStep>
bool run_cluster_step(const Scales& s, const Weights& w, const StepOperands& o, cudaStream_t stream) {
  if (kStep == BlockStep::kIn && (o.conv.W != kMostTaps || !aligned(o.conv.weight, 16))) return false;
  return with_cluster_columns<SignF16, bf16>(s.source.M, [&](auto columns) {
    const BitClusterPlan plan = choose_cluster<SignF16, bf16, kStep>(s.source, w);
    if (plan.fits) run_cluster<SignF16, bf16, columns, kStep>(s.source, w, s.epilogue, plan, o, stream);
    return plan.fits;
  });
}

// One token of bf16, or up to eight of other types, as many at once as fit.
template <BlockStep kStep, typename T>
bool run_fused_step(const Scales& all, const Weights& w, const StepOperands& o, cudaStream_t stream) {
  using X = std::conditional_t<kStep == BlockStep::kIn, float, T>;
  constexpr int64_t kMost = std::is_same_v<T, bf16> ? 1 : kMostFusedTokens<SignF16, T>;
  const int64_t M = all.source.M, N = all.epilogue.columns;
  // One plan for all: the order of a token's sums must not depend on its place.
  const int64_t planned = std::min(M, kMost);
  const auto run = [&](auto columns) {
    const FusedPlan plan = choose_fused<SignF16, T, columns, kStep>(planned, w.rows, ceil_div(w.words, kChunkWords));
    if (!plan.fits) return false;
    for (int64_t m = 0; m < M; m += kMost) {
      TokenSource source = all.source;
      source.M = std::min(M - m, kMost);
      source.x = static_cast<const X*>(source.x) + m * source.K;
      FusedArgs args = fused_args(source, w, all.epilogue, plan);
      args.step = o;
      if constexpr (kStep == BlockStep::kIn) {
        args.e.out = static_cast<T*>(all.epilogue.out) + m * N;
        if (o.conv.state_indices) {
          args.step.conv.state_indices += m;
        } else {
          args.step.conv.state = static_cast<char*>(o.conv.state) +
                                 m * o.conv.state_batch * (o.conv.state_dtype == DType::kFloat32 ? 4 : 2);
          args.step.conv.slots -= m;
        }
      } else {
        args.step.residual += m * N;
      }
      launch(fused_kernel<SignF16, T, columns, true, kStep>, fused_grid(plan, kStep), stream, args);
    }
    return true;
  };
  if constexpr (kMost == 1) {
    return run(std::integral_constant<int, FusedFormat<SignF16, T>::kPlanes>());
  } else {
    return with_fused_columns<SignF16, T>(planned, run);
  }
}

// One kernel for a few tokens. Tells whether there is one.
template <BlockStep kStep, typename T>
bool run_one_kernel(const Scales& s, const Weights& w, const StepOperands& o, cudaStream_t stream) {
#ifdef BITKERNELS_SM90A
  const int64_t M = s.source.M;
  if (!on_hopper() || M > kMostTokens || !fused_vectors<SignF16, T>(s.source, w) || !aligned(o.norm, 16)) return false;
  if (kStep == BlockStep::kIn && o.conv.W > kMostTaps) return false;
  if constexpr (std::is_same_v<T, bf16>) {
    if (M > 1) return run_cluster_step<kStep>(s, w, o, stream);
  }
  return run_fused_step<kStep, T>(s, w, o, stream);
#else
  return false;
#endif
}

// More tokens: planes of bits made after the norm, and a product that adds to the residual. Up to as many as measured.
constexpr int64_t kMostBitStepTokens = 128;

template <typename T>
bool run_bit_out_step(const Scales& all, const Weights& w, const NormedSum& step, void* workspace,
                      cudaStream_t stream) {
#ifdef BITKERNELS_SM90A
  if constexpr (std::is_same_v<T, bf16>) {
    const TokenSource& s = all.source;
    if (s.M > kMostBitStepTokens || !bits_apply(s.M, s.K)) return false;
    if (!fused_vectors<SignF16, T>(s, w) || !aligned(step.norm, 16)) return false;
    const BitPlan plan = plan_bits<SignF16, T>(s.M, w.rows, s.K, device_attribute(cudaDevAttrMultiProcessorCount));
    with_bit_tile<SignF16, T>(plan, [&](auto tile) {
      run_bit_tile<SignF16, T, decltype(tile), true>(s, w, all.epilogue, step, workspace, stream);
    });
    return true;
  }
#endif
  return false;
}

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

int64_t aligned_bytes(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// Very many: products of pairs of columns, added to the residual as they leave. The norm's weight goes into the
// columns' scales, 1 / rms into a token's. Of 16-bit types bf16 alone has the range for what was not normalised.
constexpr int64_t kLeastAddedTokens = 2048;

#ifdef BITKERNELS_SM90A

bool adds(const Mamba2OutStep& p) {
  const PackedLinear& linear = p.linear;
  return linear.M >= kLeastAddedTokens && linear.dtype == DType::kBFloat16 &&
         warpgroup_applies(linear.dtype, linear.K, linear.axis == ScaleAxis::kColumn) && linear.N % 4 == 0 &&
         aligned(p.residual, 16);
}

// Bytes from its start, where the pairs of columns are.
struct AddedWorkspace {
  int64_t pitch, tokens, partials, end;
  explicit AddedWorkspace(const PackedLinear& p) : pitch(ceil_div(p.K, kSignsPerWord) * kSignsPerWord) {
    tokens = aligned_bytes(p.M * pitch * int64_t(sizeof(fp16)));
    partials = tokens + aligned_bytes(p.M * int64_t(sizeof(Int8Token)));
    end = partials + partial_bytes<AddedTile>(processor_count());
  }
};

void run_added(const Mamba2OutStep& p, cudaStream_t stream) {
  const PackedLinear& linear = p.linear;
  const AddedWorkspace places(linear);
  char* workspace = static_cast<char*>(linear.workspace);
  Int8Token* tokens = reinterpret_cast<Int8Token*>(workspace + places.tokens);
  const bool by_column = linear.axis == ScaleAxis::kColumn;
  const float *alpha = static_cast<const float*>(linear.alpha), *beta = static_cast<const float*>(linear.beta);
  pair_rows<bf16>(
      {linear.x, by_column ? alpha : nullptr, by_column ? beta : nullptr, static_cast<const float*>(p.norm_weight),
       static_cast<float>(p.eps), reinterpret_cast<fp16*>(workspace), tokens, linear.M, linear.K, places.pitch},
      stream);
  const Weights w = weights(linear.w_packed, linear.N, ceil_div(linear.K, kSignsPerWord));
  const Epilogue e{by_column ? nullptr : alpha,
                   by_column ? nullptr : beta,
                   linear.axis == ScaleAxis::kRow ? 1 : 0,
                   static_cast<const float*>(linear.bias),
                   p.residual,
                   DType::kFloat32,
                   linear.N};
  const WarpgroupProblem product = warpgroup_problem(w, e, tokens, linear.M, linear.K);
  const Plan plan = plan_tiles<PairOperand>(ScalesOf::kNothing, linear.M, linear.N, linear.K, processor_count(),
                                            kAddedTile, kAddedTile + 1);
  run_warpgroup<PairOperand, ScalesOf::kNothing, AddedTile, float>(workspace, places.pitch, product, plan.blocks,
                                                                   plan.cut, workspace + places.partials, stream);
}

#endif

// Workspace: the normalised activations, the product's own, and the product where it is not kept.
int64_t normalised_bytes(const PackedLinear& p) { return aligned_bytes(p.M * p.K * bytes_of(p.dtype)); }

// The product of the normalised activations, which lie at the start of the workspace.
PackedLinear product(const PackedLinear& p, void* y) {
  PackedLinear normalised = p;
  normalised.x = p.workspace;
  normalised.y = y;
  normalised.workspace = static_cast<char*>(p.workspace) + normalised_bytes(p);
  return normalised;
}

int64_t product_bytes(const PackedLinear& p) { return aligned_bytes(packed_linear_workspace(product(p, nullptr))); }

template <typename X, typename T>
void normalise_and_multiply(const PackedLinear& p, const void* norm, double eps, T* y, cudaStream_t stream) {
  const PackedLinear normalised = product(p, y);
  const DType x_dtype = sizeof(X) == sizeof(float) ? DType::kFloat32 : p.dtype;
  const float* weight = static_cast<const float*>(norm);
  if (normed_packed_linear(normalised, p.x, x_dtype, weight, static_cast<float>(eps), stream)) return;
  const bool vectors = p.K % 8 == 0 && aligned(p.x, 16) && aligned(norm, 16);
  launch(vectors ? norm_kernel<X, T, true> : norm_kernel<X, T, false>,
         step_grid(dim3(static_cast<unsigned>(p.M)), kNormThreads), stream, static_cast<const X*>(p.x), weight,
         static_cast<T*>(p.workspace), static_cast<int>(p.K), static_cast<float>(eps));
  packed_linear(normalised, stream);
}

// While the input projection of several tokens computes, memory rests: the states of the step after it come as far as
// L2, of as many requests as leave room for what was written last. One token's kernels leave room for that step's own
// blocks, which ask themselves.
Ahead states_ahead(const Mamba2InStep& p) {
  constexpr int64_t kMostBytes = 24 << 20;
  if (!p.next || p.linear.M == 1) return {};
  const SsdStep& next = *p.next;
  const int64_t size = bytes_of(next.state_dtype), bytes = next.H * next.P * next.N * size;
  const bool dense = next.state_row == next.N && next.state_head == next.P * next.N;
  if (!dense || bytes == 0 || bytes % 16 != 0 || next.state_batch * size % 16 != 0 || !aligned(next.state, 16)) {
    return {};
  }
  const int64_t most = kMostBytes / bytes;
  return {next.state, next.state_indices,
          next.slots, next.state_batch * size,
          bytes,      static_cast<int>(next.batch < most ? next.batch : most)};
}

}  // namespace

int64_t mamba2_in_step_workspace(const Mamba2InStep& p) { return normalised_bytes(p.linear) + product_bytes(p.linear); }

void mamba2_in_step(const Mamba2InStep& p, Executor stream) {
  const PackedLinear& linear = p.linear;
  const Scales s = scales(linear, DType::kFloat32);
  const Weights w = weights(linear.w_packed, linear.N, ceil_div(linear.K, kSignsPerWord));
  const StepOperands o{static_cast<const float*>(p.norm_weight), static_cast<float>(p.eps), nullptr, p.conv,
                       states_ahead(p)};
  dispatch_float(linear.dtype, [&](auto t) {
    using T = decltype(t);
    const bool convolves = p.conv.channels > 0;
    if (convolves && run_one_kernel<BlockStep::kIn, T>(s, w, o, stream)) return;
    T* y = static_cast<T*>(linear.y);
    normalise_and_multiply<float, T>(linear, p.norm_weight, p.eps, y, stream);
    if (convolves) run_convolution(y, linear, p.conv, stream);
  });
}

int64_t mamba2_out_step_workspace(const Mamba2OutStep& p) {
#ifdef BITKERNELS_SM90A
  if (adds(p)) return AddedWorkspace(p.linear).end;
#endif
  const PackedLinear& linear = p.linear;
  return normalised_bytes(linear) + product_bytes(linear) + linear.M * linear.N * bytes_of(linear.dtype);
}

void mamba2_out_step(const Mamba2OutStep& p, Executor stream) {
#ifdef BITKERNELS_SM90A
  if (adds(p)) return run_added(p, stream);
#endif
  const PackedLinear& linear = p.linear;
  const Scales s = scales(linear, linear.dtype);
  const Weights w = weights(linear.w_packed, linear.N, ceil_div(linear.K, kSignsPerWord));
  float* residual = static_cast<float*>(p.residual);
  const StepOperands o{static_cast<const float*>(p.norm_weight), static_cast<float>(p.eps), residual, {}, {}};
  dispatch_float(linear.dtype, [&](auto t) {
    using T = decltype(t);
    if (run_one_kernel<BlockStep::kOut, T>(s, w, o, stream)) return;
    if (run_bit_out_step<T>(s, w, {o.norm, o.eps, residual}, linear.workspace, stream)) return;
    T* y =
        reinterpret_cast<T*>(static_cast<char*>(linear.workspace) + normalised_bytes(linear) + product_bytes(linear));
    normalise_and_multiply<T, T>(linear, p.norm_weight, p.eps, y, stream);
    const int64_t count = linear.M * linear.N;
    launch(add_kernel<T>, step_grid(dim3(static_cast<unsigned>(ceil_div(count, kNormThreads))), kNormThreads), stream,
           residual, y, count);
  });
}

}  // namespace bitkernels::cuda
