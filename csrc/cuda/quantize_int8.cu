// Per-token int8, and back: one block a token, which it reads twice (the second time from cache).
#include "int8.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "types.cuh"

namespace bitkernels::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ float scale_of_row(const T* row, int64_t K) {
  __shared__ float scratch[kThreads / 32];
  float most = 0.0f;
  for (int64_t k = threadIdx.x; k < K; k += kThreads) most = fmaxf(most, fabsf(to_float(row[k])));
  return int8_scale(block_reduce(most, Max(), scratch));
}

template <typename T>
__global__ void quantize_int8_kernel(const T* x, int8_t* q, float* scale, int64_t K) {
  const T* row = x + blockIdx.x * K;
  const float s = scale_of_row(row, K);
  for (int64_t k = threadIdx.x; k < K; k += kThreads) q[blockIdx.x * K + k] = to_int8(to_float(row[k]), s);
  if (threadIdx.x == 0) scale[blockIdx.x] = s;
}

template <typename T>
__global__ void fake_quantize_int8_kernel(const T* x, T* y, int64_t K) {
  const T* row = x + blockIdx.x * K;
  const float s = scale_of_row(row, K);
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    y[blockIdx.x * K + k] = from_float<T>(__fdiv_rn(to_int8(to_float(row[k]), s), s));
  }
}

}  // namespace

void quantize_int8(const void* x, DType dtype, int8_t* q, float* scale, int64_t M, int64_t K, Executor stream) {
  dispatch_float(dtype, [&](auto t) {
    launch(quantize_int8_kernel<decltype(t)>, Grid{dim3(static_cast<unsigned>(M)), kThreads}, stream,
           static_cast<const decltype(t)*>(x), q, scale, K);
  });
}

void fake_quantize_int8(const void* x, void* y, DType dtype, int64_t M, int64_t K, Executor stream) {
  dispatch_float(dtype, [&](auto t) {
    launch(fake_quantize_int8_kernel<decltype(t)>, Grid{dim3(static_cast<unsigned>(M)), kThreads}, stream,
           static_cast<const decltype(t)*>(x), static_cast<decltype(t)*>(y), K);
  });
}

}  // namespace bitkernels::cuda
