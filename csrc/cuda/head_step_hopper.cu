// RMSNorm of a token's residual and its product with a matrix of 16-bit elements, which is larger than any cache and
// read once: a block to a processor keeps as much of it under way as its shared memory holds.
//
// Blocks take eight rows in turn, a warp one of them, and a warp has a ring of rows in shared memory, which the copy
// engine fills. Every block makes the norm for itself while its first rows come.
#include <algorithm>

#include "bit_planes.cuh"
#include "head_step_hopper.h"
#include "hopper.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "types.cuh"

namespace bitkernels::cuda {
namespace {

constexpr int kHeadWarps = 8;
constexpr int kHeadThreads = 32 * kHeadWarps;
constexpr int kMostHeadStages = 8;
constexpr int kHeadStaticBytes = 1024;  // at most

template <typename T>
__global__ void __launch_bounds__(kHeadThreads, 1) head_step_kernel(const HeadStep p, int stages) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint4 dynamic[];
  __shared__ uint64_t arrived[kHeadWarps][kMostHeadStages];
  __shared__ float scratch[kHeadWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = uniform(thread / 32);
  const int K = static_cast<int>(p.K), chunks = K / 8, row_bytes = 2 * K;
  const int64_t step = int64_t(kHeadWarps) * gridDim.x, first = int64_t(kHeadWarps) * blockIdx.x;
  const uint8_t* weight = static_cast<const uint8_t*>(p.weight);
  // Of 8 neighbours the first four lie in one half of the activations, the others in the other: no two lanes then read
  // the same bank.
  float* x = reinterpret_cast<float*>(dynamic);
  uint8_t* ring = reinterpret_cast<uint8_t*>(dynamic) + 4 * K + warp * stages * row_bytes;

  const auto bring = [&](int64_t row, int stage) {
    const SharedAddress full = shared_address(&arrived[warp][stage]);
    barrier_arrive_expecting(full, row_bytes);
    load_bytes(shared_address(ring + stage * row_bytes), weight + row * row_bytes, row_bytes, full);
  };
  if (lane == 0) {
    for (int i = 0; i < stages; ++i) barrier_init(shared_address(&arrived[warp][i]), 1);
    barrier_init_fence();
  }
  if (lane == 0) {
    for (int i = 0; i < stages; ++i) {
      const int64_t row = first + warp + i * step;
      if (row < p.rows) prefetch_to_l2(weight + row * row_bytes, row_bytes);
    }
  }
  wait_for_previous_kernel();
  if (lane == 0) {
    for (int i = 0; i < stages; ++i) {
      const int64_t row = first + warp + i * step;
      if (row < p.rows) bring(row, i);
    }
  }
  __syncwarp();

  float squares = 0.0f;
  for (int k = thread; k < K; k += kHeadThreads) squares = fmaf(p.residual[k], p.residual[k], squares);
  const float scale = rsqrtf(block_reduce(squares, Sum{}, scratch) / static_cast<float>(K) + p.eps);
  for (int k = thread; k < K; k += kHeadThreads) {
    x[(k / 4 % 2 * chunks + k / 8) * 4 + k % 4] = to_float(from_float<T>(p.residual[k] * scale * p.norm[k]));
  }
  __syncthreads();

  int stage = 0, parity = 0;
  for (int64_t row = first + warp; row < p.rows; row += step) {
    barrier_wait(shared_address(&arrived[warp][stage]), parity);
    const T* own = reinterpret_cast<const T*>(ring + stage * row_bytes);
    float sums[4] = {};
#pragma unroll 2
    for (int first_chunk = 0; first_chunk < chunks; first_chunk += 32) {  // lanes leave it together
      const int chunk = first_chunk + lane;
      if (chunk < chunks) {
        Run<8, T> w;
        w.template load<true>(own, 8 * chunk, K);
        const float4 low = reinterpret_cast<const float4*>(x)[chunk];
        const float4 high = reinterpret_cast<const float4*>(x)[chunks + chunk];
        sums[0] = fmaf(w[0], low.x, fmaf(w[4], high.x, sums[0]));
        sums[1] = fmaf(w[1], low.y, fmaf(w[5], high.y, sums[1]));
        sums[2] = fmaf(w[2], low.z, fmaf(w[6], high.z, sums[2]));
        sums[3] = fmaf(w[3], low.w, fmaf(w[7], high.w, sums[3]));
      }
    }
    __syncwarp();  // the row has been read
    const int64_t later = row + stages * step;
    if (lane == 0 && later < p.rows) bring(later, stage);
    __syncwarp();
    const float sum = warp_reduce((sums[0] + sums[1]) + (sums[2] + sums[3]), Sum{});
    if (lane == 0) static_cast<T*>(p.logits)[row] = from_float<T>(sum);
    if (++stage == stages) stage = 0, parity ^= 1;
  }
#endif
}

int stages_of(const HeadStep& p) {
  const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kHeadStaticBytes - 4 * p.K;
  return static_cast<int>(std::clamp<int64_t>(room / (kHeadWarps * 2 * p.K), 0, kMostHeadStages));
}

}  // namespace

bool head_step_fits(const HeadStep& p) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 && p.rows > 0 && p.K > 0 && p.K % 8 == 0 &&
         p.K <= (1 << 15) && stages_of(p) >= 2;
}

void head_step(const HeadStep& p, Executor stream) {
  const int stages = stages_of(p);
  Grid grid{dim3(static_cast<unsigned>(device_attribute(cudaDevAttrMultiProcessorCount))), kHeadThreads,
            static_cast<size_t>(4 * p.K + kHeadWarps * stages * 2 * p.K), true};
  if (p.dtype == DType::kBFloat16) {
    launch(head_step_kernel<bf16>, grid, stream, p, stages);
  } else {
    launch(head_step_kernel<fp16>, grid, stream, p, stages);
  }
}

}  // namespace bitkernels::cuda
