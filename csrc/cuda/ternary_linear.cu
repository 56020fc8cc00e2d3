#include "int8.cuh"
#include "launch.cuh"
#include "types.cuh"

namespace bitkernels::cuda {
namespace {

__device__ int code(const uint32_t* w_packed, int64_t words, int64_t n, int64_t k) {
  return static_cast<int>(w_packed[n * words + k / 16] >> (k % 16 * 2) & 3) - 1;
}

__global__ void forward(TernaryLinear p) {
  const int64_t words = ceil_div(p.K, kTernaryPerWord);
  const float scale = *static_cast<const float*>(p.scale);
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.M * p.N; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t m = i / p.N, n = i % p.N;
    float y = 0;
    if (p.int8_activations) {
      float most = 0;
      for (int64_t k = 0; k < p.K; ++k) most = fmaxf(most, fabsf(load(p.x, p.dtype, m * p.K + k)));
      const float s = int8_scale(most);
      int sum = 0;
      for (int64_t k = 0; k < p.K; ++k) {
        sum += code(p.w_packed, words, n, k) * to_int8(load(p.x, p.dtype, m * p.K + k), s);
      }
      y = __fmul_rn(__int2float_rn(sum), __fdiv_rn(scale, s));
    } else {
      float sum = 0;
      for (int64_t k = 0; k < p.K; ++k) {
        sum += static_cast<float>(code(p.w_packed, words, n, k)) * load(p.x, p.dtype, m * p.K + k);
      }
      y = __fmul_rn(scale, sum);
    }
    if (p.bias) y = __fadd_rn(y, static_cast<const float*>(p.bias)[n]);
    store(p.y, p.dtype, i, y);
  }
}

__global__ void backward(TernaryLinearBackward p) {
  const int64_t words = ceil_div(p.K, kTernaryPerWord);
  const float scale = *static_cast<const float*>(p.scale);
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.M * p.K; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t m = i / p.K, k = i % p.K;
    float sum = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      sum += static_cast<float>(code(p.w_packed, words, n, k)) * load(p.grad, p.dtype, m * p.N + n);
    }
    store(p.dx, p.dtype, i, scale * sum);
  }
}

}  // namespace

int64_t ternary_linear_workspace(const TernaryLinear&) { return 0; }
void ternary_linear(const TernaryLinear& p, Executor stream) {
  launch(forward, Grid{blocks_for(p.M * p.N, 256), 256}, stream, p);
}
int64_t ternary_linear_backward_workspace(const TernaryLinearBackward&) { return 0; }
void ternary_linear_backward(const TernaryLinearBackward& p, Executor stream) {
  launch(backward, Grid{blocks_for(p.M * p.K, 256), 256}, stream, p);
}

}  // namespace bitkernels::cuda
