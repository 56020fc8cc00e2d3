// One pass over the product G = dy^T x: the gradients of the latent weight and of both scales.
//
// A warp takes 256 columns of a row, a lane eight neighbouring ones: one byte of signs.
#include <algorithm>
#include <type_traits>

#include "add_rows.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

namespace bitkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpColumns = 32 * kEight;
// Rows, or pieces of one, that a warp asks for at once: memory is far, and what is stored might be what is loaded next.
template <bool kVector>
constexpr int kBatch = kVector ? 4 : 1;
constexpr int kBlocksOfProcessor = 3;

// The signs of eight columns, of which the first is a multiple of eight.
__device__ uint32_t signs_of(const uint32_t* w_packed, int64_t n, int64_t words, int64_t k, int64_t K) {
  return k < K ? reinterpret_cast<const uint8_t*>(w_packed + n * words)[k / kEight] : 0;
}

__device__ float signed_value(uint32_t signs, int e, float v) { return signs >> e & 1 ? v : -v; }

// Scales of columns. Blocks of one column of the grid take the rows in turn; each leaves a row of partial sums.
template <typename In, typename Out, bool kVector>
__global__ void __launch_bounds__(kThreads, kBlocksOfProcessor)
    column_gradients_kernel(const In* product, const uint32_t* w_packed, const float* alpha, Out* dweight,
                            float* signed_rows, float* plain_rows, int64_t N, int64_t K, int64_t rows_of_block) {
  __shared__ float scratch[2][kWarps][kWarpColumns];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t words = ceil_div(K, kSignsPerWord);
  const int64_t first_column = int64_t(blockIdx.x) * kWarpColumns;
  const int64_t k = first_column + lane * kEight;
  const int64_t end = min(N, (blockIdx.y + 1) * rows_of_block);
  float scale[kEight];
#pragma unroll
  for (int e = 0; e < kEight; ++e) scale[e] = k + e < K ? alpha[k + e] : 0.0f;
  float signed_sum[kEight] = {};
  float plain_sum[kEight] = {};
  for (int64_t first = blockIdx.y * rows_of_block + warp; first < end; first += kWarps * kBatch<kVector>) {
    Eight<In> in[kBatch<kVector>];
    uint32_t signs[kBatch<kVector>];
#pragma unroll
    for (int i = 0; i < kBatch<kVector>; ++i) {
      const int64_t n = first + i * kWarps;
      in[i] = load_eight(product + n * K, k, n < end ? K : 0, kVector);
      signs[i] = signs_of(w_packed, n, words, k, n < end ? K : 0);
    }
#pragma unroll
    for (int i = 0; i < kBatch<kVector>; ++i) {
      const int64_t n = first + i * kWarps;
      float v[kEight];
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        v[e] = to_float(in[i].e[e]);
        signed_sum[e] += signed_value(signs[i], e, v[e]);
        plain_sum[e] += v[e];
        v[e] *= scale[e];
      }
      if (dweight) store_eight(dweight + n * K, k, n < end ? K : 0, kVector, v);
    }
  }
  if (!signed_rows) return;
#pragma unroll
  for (int e = 0; e < kEight; ++e) {
    scratch[0][warp][e * 32 + lane] = signed_sum[e];
    scratch[1][warp][e * 32 + lane] = plain_sum[e];
  }
  __syncthreads();
  const int64_t column = first_column + threadIdx.x % 32 * kEight + threadIdx.x / 32;
  if (column >= K) return;
  float signed_total = 0.0f;
  float plain_total = 0.0f;
  for (int i = 0; i < kWarps; ++i) {
    signed_total += scratch[0][i][threadIdx.x];
    plain_total += scratch[1][i][threadIdx.x];
  }
  signed_rows[blockIdx.y * K + column] = signed_total;
  plain_rows[blockIdx.y * K + column] = plain_total;
}

// Scales of rows, or a single one: a warp a row.
template <typename In, typename Out, bool kVector>
__global__ void __launch_bounds__(kThreads)
    row_gradients_kernel(const In* product, const uint32_t* w_packed, const float* alpha, int64_t stride, Out* dweight,
                         float* dalpha, float* dbeta, int64_t N, int64_t K) {
  const int lane = threadIdx.x % 32;
  const int64_t words = ceil_div(K, kSignsPerWord);
  const int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (n >= N) return;
  const float scale = alpha[n * stride];
  float signed_sum = 0.0f;
  float plain_sum = 0.0f;
  for (int64_t first = lane * kEight; first < K; first += kWarpColumns * kBatch<kVector>) {
    Eight<In> in[kBatch<kVector>];
    uint32_t signs[kBatch<kVector>];
#pragma unroll
    for (int i = 0; i < kBatch<kVector>; ++i) {
      const int64_t k = first + i * kWarpColumns;
      in[i] = load_eight(product + n * K, k, K, kVector);
      signs[i] = signs_of(w_packed, n, words, k, K);
    }
#pragma unroll
    for (int i = 0; i < kBatch<kVector>; ++i) {
      const int64_t k = first + i * kWarpColumns;
      float v[kEight];
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        v[e] = to_float(in[i].e[e]);
        signed_sum += signed_value(signs[i], e, v[e]);
        plain_sum += v[e];
        v[e] *= scale;
      }
      if (dweight) store_eight(dweight + n * K, k, K, kVector, v);
    }
  }
  if (!dalpha) return;
  signed_sum = warp_reduce(signed_sum, Sum());
  plain_sum = warp_reduce(plain_sum, Sum());
  if (lane == 0) {
    dalpha[n] = signed_sum;
    dbeta[n] = plain_sum;
  }
}

// As many blocks as run at once, and no more rows of partial sums than there are rows for every warp.
int64_t row_blocks(int64_t N, int64_t K) {
  const int64_t at_once = kBlocksOfProcessor * device_attribute(cudaDevAttrMultiProcessorCount);
  return std::clamp<int64_t>(at_once / ceil_div(K, kWarpColumns), 1, ceil_div(N, kWarps));
}

}  // namespace

int64_t sign_linear_weight_backward_workspace(const SignLinearWeightBackward& p) {
  return p.axis == ScaleAxis::kColumn && p.dalpha ? 2 * row_blocks(p.N, p.K) * p.K * sizeof(float) : 0;
}

void sign_linear_weight_backward(const SignLinearWeightBackward& p, Executor stream) {
  const float* alpha = static_cast<const float*>(p.alpha);
  float* dalpha = static_cast<float*>(p.dalpha);
  float* dbeta = static_cast<float*>(p.dbeta);
  const auto run = [&](const auto* product, auto* dweight, auto vector) {
    using In = std::remove_cvref_t<decltype(*product)>;
    using Out = std::remove_cvref_t<decltype(*dweight)>;
    if (p.axis != ScaleAxis::kColumn) {
      const int64_t stride = p.axis == ScaleAxis::kRow ? 1 : 0;
      launch(row_gradients_kernel<In, Out, vector>, Grid{dim3(static_cast<unsigned>(ceil_div(p.N, kWarps))), kThreads},
             stream, product, p.w_packed, alpha, stride, dweight, dalpha, dbeta, p.N, p.K);
      return;
    }
    const int64_t rows = row_blocks(p.N, p.K);
    float* signed_rows = dalpha ? static_cast<float*>(p.workspace) : nullptr;
    float* plain_rows = dalpha ? signed_rows + rows * p.K : nullptr;
    const dim3 blocks(static_cast<unsigned>(ceil_div(p.K, kWarpColumns)), static_cast<unsigned>(rows));
    launch(column_gradients_kernel<In, Out, vector>, Grid{blocks, kThreads}, stream, product, p.w_packed, alpha,
           dweight, signed_rows, plain_rows, p.N, p.K, ceil_div(p.N, rows));
    if (dalpha) add_rows(signed_rows, plain_rows, rows, p.K, dalpha, dbeta, stream);
  };
  dispatch_float(p.dtype, [&](auto in) {
    dispatch_float(p.weight_dtype, [&](auto out) {
      const auto* product = static_cast<const decltype(in)*>(p.product);
      auto* dweight = static_cast<decltype(out)*>(p.dweight);
      if (in_vectors(product, p.K) && in_vectors(dweight, p.K)) {
        run(product, dweight, std::true_type());
      } else {
        run(product, dweight, std::false_type());
      }
    });
  });
}

}  // namespace bitkernels::cuda
