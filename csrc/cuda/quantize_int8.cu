// Per-token int8, and back: one block a token, which it reads twice (the second time from cache).
#include "int8.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

namespace bitkernels::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__device__ float scale_of_row(const T* row, int64_t K, bool vector) {
  __shared__ float scratch[kThreads / 32];
  float most = 0.0f;
  for (int64_t k = threadIdx.x * kEight; k < K; k += kThreads * kEight) {
    const Eight<T> in = load_eight(row, k, K, vector);
#pragma unroll
    for (int e = 0; e < kEight; ++e) most = fmaxf(most, fabsf(to_float(in.e[e])));
  }
  return int8_scale(block_reduce(most, Max(), scratch));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_int8_kernel(const T* x, int8_t* q, float* scale, int64_t K, bool vector) {
  const T* row = x + blockIdx.x * K;
  const float s = scale_of_row(row, K, vector);
  for (int64_t k = threadIdx.x * kEight; k < K; k += kThreads * kEight) {
    const Eight<T> in = load_eight(row, k, K, vector);
    float out[kEight];
#pragma unroll
    for (int e = 0; e < kEight; ++e) out[e] = to_int8(to_float(in.e[e]), s);
    store_eight(q + blockIdx.x * K, k, K, vector, out);
  }
  if (threadIdx.x == 0) scale[blockIdx.x] = s;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) fake_quantize_int8_kernel(const T* x, T* y, int64_t K, bool vector) {
  const T* row = x + blockIdx.x * K;
  const float s = scale_of_row(row, K, vector);
  for (int64_t k = threadIdx.x * kEight; k < K; k += kThreads * kEight) {
    const Eight<T> in = load_eight(row, k, K, vector);
    float out[kEight];
#pragma unroll
    for (int e = 0; e < kEight; ++e) out[e] = __fdiv_rn(to_int8(to_float(in.e[e]), s), s);
    store_eight(y + blockIdx.x * K, k, K, vector, out);
  }
}

}  // namespace

void quantize_int8(const void* x, DType dtype, int8_t* q, float* scale, int64_t M, int64_t K, Executor stream) {
  dispatch_float(dtype, [&](auto t) {
    const auto* rows = static_cast<const decltype(t)*>(x);
    launch(quantize_int8_kernel<decltype(t)>, Grid{dim3(static_cast<unsigned>(M)), kThreads}, stream, rows, q, scale, K,
           in_vectors(rows, K) && in_vectors(q, K));
  });
}

void fake_quantize_int8(const void* x, void* y, DType dtype, int64_t M, int64_t K, Executor stream) {
  dispatch_float(dtype, [&](auto t) {
    const auto* rows = static_cast<const decltype(t)*>(x);
    auto* out = static_cast<decltype(t)*>(y);
    launch(fake_quantize_int8_kernel<decltype(t)>, Grid{dim3(static_cast<unsigned>(M)), kThreads}, stream, rows, out, K,
           in_vectors(rows, K) && in_vectors(out, K));
  });
}

}  // namespace bitkernels::cuda
