#include "launch.cuh"
#include "types.cuh"

namespace bitkernels::cuda {
namespace {

__global__ void forward(PackedLinear p) {
  const int64_t words = ceil_div(p.K, kSignsPerWord);
  const float* alpha = static_cast<const float*>(p.alpha);
  const float* beta = static_cast<const float*>(p.beta);
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.M * p.N; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t m = i / p.N, n = i % p.N;
    float sum = 0, plain = 0;
    for (int64_t k = 0; k < p.K; ++k) {
      const float x = load(p.x, p.dtype, m * p.K + k);
      const bool plus = p.w_packed[n * words + k / 32] >> (k % 32) & 1;
      const float a = p.axis == ScaleAxis::kColumn ? alpha[k] : 1.0f;
      sum += plus ? a * x : -a * x;
      plain += (p.axis == ScaleAxis::kColumn ? beta[k] : 1.0f) * x;
    }
    const int64_t s = p.axis == ScaleAxis::kRow ? n : 0;
    float y = p.axis == ScaleAxis::kColumn ? sum + plain : alpha[s] * sum + beta[s] * plain;
    if (p.bias) y += static_cast<const float*>(p.bias)[n];
    store(p.y, p.dtype, i, y);
  }
}

__global__ void backward_dx(PackedLinearBackward p) {
  const int64_t words = ceil_div(p.K, kSignsPerWord);
  const float* alpha = static_cast<const float*>(p.alpha);
  const float* beta = static_cast<const float*>(p.beta);
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.M * p.K; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t m = i / p.K, k = i % p.K;
    float h = 0, d = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      const float g = load(p.grad, p.dtype, m * p.N + n);
      const bool plus = p.w_packed[n * words + k / 32] >> (k % 32) & 1;
      const int64_t s = p.axis == ScaleAxis::kRow ? n : 0;
      const float a = p.axis == ScaleAxis::kColumn ? 1.0f : alpha[s];
      h += plus ? a * g : -a * g;
      d += p.axis == ScaleAxis::kColumn ? g : beta[s] * g;
    }
    store(p.dx, p.dtype, i, p.axis == ScaleAxis::kColumn ? alpha[k] * h + beta[k] * d : h + d);
  }
}

__global__ void backward_scales(PackedLinearBackward p) {
  const int64_t words = ceil_div(p.K, kSignsPerWord);
  for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < p.K; k += int64_t(gridDim.x) * blockDim.x) {
    float dalpha = 0, dbeta = 0;
    for (int64_t m = 0; m < p.M; ++m) {
      float h = 0, d = 0;
      for (int64_t n = 0; n < p.N; ++n) {
        const float g = load(p.grad, p.dtype, m * p.N + n);
        h += p.w_packed[n * words + k / 32] >> (k % 32) & 1 ? g : -g;
        d += g;
      }
      const float x = load(p.x, p.dtype, m * p.K + k);
      dalpha += x * h;
      dbeta += x * d;
    }
    static_cast<float*>(p.dalpha)[k] = dalpha;
    static_cast<float*>(p.dbeta)[k] = dbeta;
  }
}

}  // namespace

int64_t packed_linear_workspace(const PackedLinear&) { return 0; }
void packed_linear(const PackedLinear& p, Executor stream) {
  launch(forward, Grid{blocks_for(p.M * p.N, 256), 256}, stream, p);
}
int64_t packed_linear_backward_workspace(const PackedLinearBackward&) { return 0; }
void packed_linear_backward(const PackedLinearBackward& p, Executor stream) {
  launch(backward_dx, Grid{blocks_for(p.M * p.K, 256), 256}, stream, p);
  if (p.dalpha) launch(backward_scales, Grid{blocks_for(p.K, 32), 32}, stream, p);
}

}  // namespace bitkernels::cuda
