// Norms of rows: a block holds a row, or a group of one, in registers. Rows that are too wide for that, or cannot be
// read four elements at a time, are read twice, the second time from cache.
#include "launch.cuh"
#include "reduce.cuh"
#include "rms_norms_cuda.h"
#include "step.cuh"
#include "vector.cuh"

namespace bitkernels::cuda {
namespace {

constexpr int kMostItems = 8;  // vectors of a thread
constexpr int kMostThreads = 512;
constexpr int kThreads = 256;  // where a row is read twice

__device__ inline float inverse_rms(float square, int64_t width, float eps) {
  __shared__ float scratch[kMostThreads / 32];
  return 1.0f / sqrtf(block_reduce(square, Sum(), scratch) / width + eps);
}

__device__ inline float squares(const float4& v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

__device__ inline float4 scaled(const float4& v, float s, const float4& w) {
  return {v.x * s * w.x, v.y * s * w.y, v.z * s * w.z, v.w * s * w.w};
}

template <typename T, int kItems>
__global__ void __launch_bounds__(kMostThreads) add_rms_norm_kernel(AddNorm a) {
  const int64_t row = blockIdx.x * a.width;
  const auto column = [](int i) {
    return (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVector;
  };
  Raw<T> branch[kItems];
  float4 total[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    branch[i] = {}, total[i] = {};
    if (column(i) >= a.width) continue;
    branch[i] = load_raw(static_cast<const T*>(a.branch) + row + column(i));
    if (a.residual) total[i] = *reinterpret_cast<const float4*>(a.residual + row + column(i));
  }
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const float4 b = widen<T>(branch[i]);
    total[i] = {total[i].x + b.x, total[i].y + b.y, total[i].z + b.z, total[i].w + b.w};
    square += squares(total[i]);
    if (column(i) < a.width) *reinterpret_cast<float4*>(a.total + row + column(i)) = total[i];
  }
  const float inverse = inverse_rms(square, a.width, a.eps);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (column(i) >= a.width) continue;
    const float4 weight = load_vector(a.weight, a.weight_dtype, column(i));
    store_vector(a.normed, a.out_dtype, row + column(i), scaled(total[i], inverse, weight));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) add_wide_rms_norm_kernel(AddNorm a) {
  const int64_t row = blockIdx.x * a.width;
  float square = 0.0f;
  for (int64_t d = threadIdx.x; d < a.width; d += kThreads) {
    const float branch = to_float(static_cast<const T*>(a.branch)[row + d]);
    const float total = branch + (a.residual ? a.residual[row + d] : 0.0f);
    a.total[row + d] = total;
    square += total * total;
  }
  const float inverse = inverse_rms(square, a.width, a.eps);
  for (int64_t d = threadIdx.x; d < a.width; d += kThreads) {
    store(a.normed, a.out_dtype, row + d, a.total[row + d] * inverse * load(a.weight, a.weight_dtype, d));
  }
}

__device__ inline float4 gated(const float4& x, const float4& z) {
  return {x.x * silu(z.x), x.y * silu(z.y), x.z * silu(z.z), x.w * silu(z.w)};
}

// Blocks are by rows and groups of them.
template <typename T, int kItems>
__global__ void __launch_bounds__(kMostThreads) gated_rms_norm_kernel(GatedNorm a) {
  const int64_t first = blockIdx.y * a.group;
  const T* x_row = static_cast<const T*>(a.x) + blockIdx.x * a.x_row + first;
  const T* z_row = static_cast<const T*>(a.z) + blockIdx.x * a.z_row + first;
  T* y_row = static_cast<T*>(a.y) + blockIdx.x * a.width + first;
  const auto column = [](int i) {
    return (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVector;
  };
  Raw<T> x[kItems], z[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    x[i] = z[i] = {};
    if (column(i) >= a.group) continue;
    x[i] = load_raw(x_row + column(i));
    z[i] = load_raw(z_row + column(i));
  }
  float4 g[kItems];
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    g[i] = gated(widen<T>(x[i]), widen<T>(z[i]));
    square += squares(g[i]);
  }
  const float inverse = inverse_rms(square, a.group, a.eps);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (column(i) >= a.group) continue;
    const float4 weight = load_vector(a.weight, a.weight_dtype, first + column(i));
    store_vector(y_row + column(i), scaled(g[i], inverse, weight));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gated_wide_rms_norm_kernel(GatedNorm a) {
  const int64_t first = blockIdx.y * a.group;
  const T* x_row = static_cast<const T*>(a.x) + blockIdx.x * a.x_row + first;
  const T* z_row = static_cast<const T*>(a.z) + blockIdx.x * a.z_row + first;
  const auto g = [&](int64_t d) { return to_float(x_row[d]) * silu(to_float(z_row[d])); };
  float square = 0.0f;
  for (int64_t d = threadIdx.x; d < a.group; d += kThreads) square += g(d) * g(d);
  const float inverse = inverse_rms(square, a.group, a.eps);
  for (int64_t d = threadIdx.x; d < a.group; d += kThreads) {
    const float y = g(d) * inverse * load(a.weight, a.weight_dtype, first + d);
    static_cast<T*>(a.y)[blockIdx.x * a.width + first + d] = from_float<T>(y);
  }
}

// Calls f(items) with a constant: few, for several rows to be under way on a processor, until threads become too many.
template <typename F>
void dispatch_items(int64_t vectors, F&& f) {
  if (vectors <= 256) return f(std::integral_constant<int, 1>());
  if (vectors <= 768) return f(std::integral_constant<int, 2>());
  if (vectors <= 2048) return f(std::integral_constant<int, 4>());
  return f(std::integral_constant<int, kMostItems>());
}

bool fits_registers(int64_t width) { return width % kVector == 0 && width <= kMostThreads * kMostItems * kVector; }

int threads_for(int64_t vectors, int items) { return static_cast<int>(ceil_div(ceil_div(vectors, items), 32) * 32); }

}  // namespace

void add_norm(const AddNorm& a, Executor stream) {
  const bool vectors = fits_registers(a.width) && loads_vectors(a.branch, a.dtype) &&
                       loads_vectors(a.residual, DType::kFloat32) && loads_vectors(a.weight, a.weight_dtype);
  const dim3 blocks(static_cast<unsigned>(a.rows));
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (!vectors) return launch(add_wide_rms_norm_kernel<T>, Grid{blocks, kThreads}, stream, a);
    dispatch_items(a.width / kVector, [&](auto items) {
      launch(add_rms_norm_kernel<T, items>, Grid{blocks, threads_for(a.width / kVector, items)}, stream, a);
    });
  });
}

void gated_norm(const GatedNorm& a, Executor stream) {
  const bool vectors = fits_registers(a.group) && a.x_row % kVector == 0 && a.z_row % kVector == 0 &&
                       loads_vectors(a.x, a.dtype) && loads_vectors(a.z, a.dtype) &&
                       loads_vectors(a.weight, a.weight_dtype);
  const dim3 blocks(static_cast<unsigned>(a.rows), static_cast<unsigned>(a.width / a.group));
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (!vectors) return launch(gated_wide_rms_norm_kernel<T>, Grid{blocks, kThreads}, stream, a);
    dispatch_items(a.group / kVector, [&](auto items) {
      launch(gated_rms_norm_kernel<T, items>, Grid{blocks, threads_for(a.group / kVector, items)}, stream, a);
    });
  });
}

}  // namespace bitkernels::cuda
