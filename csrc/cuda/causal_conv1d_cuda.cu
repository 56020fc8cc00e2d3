// Depthwise causal convolution over time, channels last. A thread takes four channels along a strip of tokens and keeps
// the last inputs in registers, so that each is read once; eight tokens are under way while eight others are made. More
// than four taps, and what cannot be read four channels at a time, take a kernel that reads every input anew, from
// cache.
#include "causal_conv1d_cuda.h"
#include "launch.cuh"
#include "step.cuh"
#include "vector.cuh"

namespace bitkernels::cuda {
namespace {

constexpr int kStrip = 32, kLongStrip = 64, kAtOnce = 8;  // tokens
constexpr int kThreads = 64;
constexpr int kBusyBlocks = 4096;     // from so many of long strips on, these are enough
constexpr int kElementThreads = 256;  // where a thread makes one output
constexpr int kMostTaps = 4;

__device__ inline int64_t integer(const void* p, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

// The sequence that a token belongs to, and where in the row it begins and ends.
struct Span {
  int64_t sequence, begin, end;
};

__device__ inline Span sequence(const Convolution& a, int64_t i) {
  return {i, i == 0 ? 0 : max(integer(a.cu_seqlens, a.wide_cu_seqlens, i), int64_t(0)),
          i + 1 >= a.sequences ? a.T : integer(a.cu_seqlens, a.wide_cu_seqlens, i + 1)};
}

__device__ inline Span sequence_of(const Convolution& a, int64_t row, int64_t token) {
  if (!a.cu_seqlens) return {row, 0, a.T};
  int64_t low = 0, high = a.sequences;  // the last that begins at the token or before, as empty ones begin there too
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (integer(a.cu_seqlens, a.wide_cu_seqlens, middle) <= token ? low : high) = middle;
  }
  return sequence(a, low);
}

__device__ inline int64_t segment(const Convolution& a, int64_t row, int64_t token) {
  return integer(a.seq_idx, a.wide_seq_idx, row * a.T + token);
}

template <typename T>
__device__ float4 input(const Convolution& a, int64_t row, const Span& span, int64_t token, int64_t c) {
  if (token >= span.begin) {
    return widen<T>(load_raw(static_cast<const T*>(a.x) + row * a.x_batch + token * a.x_time + c));
  }
  if (!a.initial) return {};
  const int64_t before = token - span.begin + a.W - 1;
  return load_vector(a.initial, a.initial_dtype, span.sequence * a.initial_sequence + before * a.initial_time + c);
}

// [channel][tap] of four channels, by vectors.
template <int W, typename T>
__device__ void load_taps(const void* p, int64_t c, float (&taps)[kVector * W]) {
  Raw<T> raw[W];
#pragma unroll
  for (int i = 0; i < W; ++i) raw[i] = load_raw(static_cast<const T*>(p) + c * W + i * kVector);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const float4 v = widen<T>(raw[i]);
    taps[i * kVector] = v.x, taps[i * kVector + 1] = v.y, taps[i * kVector + 2] = v.z, taps[i * kVector + 3] = v.w;
  }
}

template <int W>
__device__ void load_taps(const void* p, DType dtype, int64_t c, float (&taps)[kVector * W]) {
  switch (dtype) {
    case DType::kBFloat16: return load_taps<W, bf16>(p, c, taps);
    case DType::kFloat16: return load_taps<W, fp16>(p, c, taps);
    default: return load_taps<W, float>(p, c, taps);
  }
}

__device__ inline void add_product(float4& sum, const float4& a, const float4& b) {
  sum = {fmaf(a.x, b.x, sum.x), fmaf(a.y, b.y, sum.y), fmaf(a.z, b.z, sum.z), fmaf(a.w, b.w, sum.w)};
}

// Blocks are by strips of all rows and channels. kMixed: a strip may hold several sequences, by cu_seqlens or seq_idx.
template <typename T, int W, bool kMixed>
__global__ void __launch_bounds__(kThreads) causal_conv1d_kernel(Convolution a, int strips, int strip) {
  const int64_t row = blockIdx.x / strips, first = int64_t(blockIdx.x % strips) * strip;
  const int64_t c = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kVector;
  if (c >= a.C) return;
  const int count = static_cast<int>(min(a.T - first, int64_t(strip)));
  const T* x = static_cast<const T*>(a.x) + row * a.x_batch + first * a.x_time + c;
  T* y = static_cast<T*>(a.y) + (row * a.T + first) * a.C + c;

  Raw<T> ahead[kAtOnce] = {};
  int64_t segments_ahead[kAtOnce] = {};
  const auto fetch = [&](int step) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i, x += a.x_time) {
      if (step + i >= count) continue;
      ahead[i] = load_raw(x);
      if (kMixed && a.seq_idx) segments_ahead[i] = segment(a, row, first + step + i);
    }
  };
  fetch(0);
  float4 weight[W], bias = {};  // newest first, as what follows
  {
    float taps[kVector * W];
    load_taps<W>(a.weight, a.weight_dtype, c, taps);
#pragma unroll
    for (int back = 0; back < W; ++back) {
      const float* newest = taps + W - 1 - back;
      weight[back] = {newest[0], newest[W], newest[2 * W], newest[3 * W]};
    }
  }
  if (a.bias) bias = load_vector(a.bias, a.bias_dtype, c);
  Span span = kMixed ? sequence_of(a, row, first) : Span{row, 0, a.T};
  float4 inputs[W];
  int64_t segments[W] = {};
  const auto read_history = [&](int64_t token) {
#pragma unroll
    for (int back = 1; back < W; ++back) {
      inputs[back - 1] = input<T>(a, row, span, token - back, c);
      // What came before the first token is of its sequence.
      if (kMixed && a.seq_idx) segments[back - 1] = segment(a, row, max(token - back, span.begin));
    }
  };
  read_history(first);
#pragma unroll 1
  for (int step = 0; step < count; step += kAtOnce) {
    Raw<T> read[kAtOnce];
    int64_t read_segments[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) read[i] = ahead[i], read_segments[i] = segments_ahead[i];
    fetch(step + kAtOnce);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i, y += a.C) {
      if (step + i >= count) break;
      if (kMixed && first + step + i >= span.end) {
        while (first + step + i >= span.end) span = sequence(a, span.sequence + 1);
        read_history(first + step + i);
      }
#pragma unroll
      for (int back = W - 1; back > 0; --back) inputs[back] = inputs[back - 1], segments[back] = segments[back - 1];
      inputs[0] = widen<T>(read[i]), segments[0] = read_segments[i];
      float4 sum = bias;
#pragma unroll
      for (int back = 0; back < W; ++back) {
        if (!kMixed || segments[back] == segments[0]) add_product(sum, inputs[back], weight[back]);
      }
      if (a.silu) sum = {silu(sum.x), silu(sum.y), silu(sum.z), silu(sum.w)};
      store_vector(y, sum);
    }
  }
}

// Blocks are by tokens of all rows and channels.
template <typename T>
__global__ void __launch_bounds__(kElementThreads) causal_conv1d_element_kernel(Convolution a) {
  const int64_t row = blockIdx.x / a.T, token = blockIdx.x % a.T;
  const int64_t c = int64_t(blockIdx.y) * kElementThreads + threadIdx.x;
  if (c >= a.C) return;
  const Span span = sequence_of(a, row, token);
  float sum = a.bias ? load(a.bias, a.bias_dtype, c) : 0.0f;
  for (int64_t back = 0; back < a.W; ++back) {
    const int64_t at = token - back;
    if (at < span.begin && !a.initial) break;
    if (a.seq_idx && segment(a, row, max(at, span.begin)) != segment(a, row, token)) continue;
    const float value =
        at >= span.begin ? to_float(static_cast<const T*>(a.x)[row * a.x_batch + at * a.x_time + c])
                         : load(a.initial, a.initial_dtype,
                                span.sequence * a.initial_sequence + (at - span.begin + a.W - 1) * a.initial_time + c);
    sum = fmaf(value, load(a.weight, a.weight_dtype, c * a.W + a.W - 1 - back), sum);
  }
  static_cast<T*>(a.y)[(row * a.T + token) * a.C + c] = from_float<T>(a.silu ? silu(sum) : sum);
}

template <typename T, int W>
void launch_strips(const Convolution& a, Executor stream) {
  const int64_t columns = ceil_div(a.C, kThreads * kVector);
  const bool busy = ceil_div(a.T, kLongStrip) * a.batch * columns >= kBusyBlocks;
  const int strip = busy ? kLongStrip : kStrip, strips = static_cast<int>(ceil_div(a.T, strip));
  const dim3 blocks(static_cast<unsigned>(strips * a.batch), static_cast<unsigned>(columns));
  const auto kernel = a.cu_seqlens || a.seq_idx ? causal_conv1d_kernel<T, W, true> : causal_conv1d_kernel<T, W, false>;
  launch(kernel, Grid{blocks, kThreads}, stream, a, strips, strip);
}

bool reads_vectors(const Convolution& a) {
  const auto dense = [](const void* p, DType dtype, int64_t outer, int64_t inner) {
    return loads_vectors(p, dtype) && outer % kVector == 0 && inner % kVector == 0;
  };
  return a.W >= 2 && a.W <= kMostTaps && a.C % kVector == 0 && dense(a.x, a.dtype, a.x_batch, a.x_time) &&
         dense(a.initial, a.initial_dtype, a.initial_sequence, a.initial_time) && loads_vectors(a.bias, a.bias_dtype) &&
         loads_vectors(a.weight, a.weight_dtype);
}

}  // namespace

void convolve(const Convolution& a, Executor stream) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (!reads_vectors(a)) {
      const dim3 blocks(static_cast<unsigned>(a.batch * a.T), static_cast<unsigned>(ceil_div(a.C, kElementThreads)));
      return launch(causal_conv1d_element_kernel<T>, Grid{blocks, kElementThreads}, stream, a);
    }
    if (a.W == 2) return launch_strips<T, 2>(a, stream);
    if (a.W == 3) return launch_strips<T, 3>(a, stream);
    launch_strips<T, 4>(a, stream);
  });
}

}  // namespace bitkernels::cuda
