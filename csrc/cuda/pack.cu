// Packing and unpacking: the natural layout, least significant bit first along K.
#include "launch.cuh"
#include "types.cuh"

namespace bitkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// A warp turns this many groups of 32 weights into words at a time: so many loads are in flight.
constexpr int kGroups = 8;

__device__ bool is_plus(float v) { return v >= 0.0f; }

template <typename T>
__global__ void pack_sign_kernel(const T* w, uint32_t* w_packed, int64_t N, int64_t K) {
  const int64_t words = ceil_div(K, kSignsPerWord);
  const int64_t batches = ceil_div(words, kGroups);
  const int lane = threadIdx.x % 32;
  const int64_t first = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t item = first; item < N * batches; item += int64_t(gridDim.x) * kWarps) {
    const int64_t n = item / batches;
    const int64_t word = (item % batches) * kGroups;
    bool plus[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int64_t k = (word + i) * kSignsPerWord + lane;
      plus[i] = k < K && is_plus(to_float(w[n * K + k]));
    }
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint32_t bits = __ballot_sync(0xffffffff, plus[i]);
      if (lane == i) mine = bits;
    }
    if (lane < kGroups && word + lane < words) w_packed[n * words + word + lane] = mine;
  }
}

// The low 16 bits of v, moved to the even bits.
__device__ uint32_t spread(uint32_t v) {
  v &= 0xffff;
  v = (v | v << 8) & 0x00ff00ff;
  v = (v | v << 4) & 0x0f0f0f0f;
  v = (v | v << 2) & 0x33333333;
  return (v | v << 1) & 0x55555555;
}

// Halves round to even, so +-0.5 is zero.
template <typename T>
__global__ void pack_ternary_kernel(const T* w, const float* scale, uint32_t* w_packed, int64_t N, int64_t K) {
  const float factor = scale ? __frcp_rn(*scale) : 1.0f;
  const int64_t words = ceil_div(K, kTernaryPerWord);
  constexpr int kWords = 2 * kGroups;
  const int64_t batches = ceil_div(words, kWords);
  const int lane = threadIdx.x % 32;
  const int64_t first = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t item = first; item < N * batches; item += int64_t(gridDim.x) * kWarps) {
    const int64_t n = item / batches;
    const int64_t word = (item % batches) * kWords;
    float v[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int64_t k = word * kTernaryPerWord + i * 32 + lane;
      v[i] = k < K ? to_float(w[n * K + k]) * factor : 0.0f;
    }
    uint32_t two = 0, one = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint32_t plus = __ballot_sync(0xffffffff, v[i] > 0.5f);
      const uint32_t minus = __ballot_sync(0xffffffff, v[i] < -0.5f);
      if (lane / 2 == i) {
        two = lane % 2 ? plus >> 16 : plus;
        one = ~(lane % 2 ? (plus | minus) >> 16 : plus | minus);
      }
    }
    if (lane < kWords && word + lane < words) w_packed[n * words + word + lane] = spread(two) << 1 | spread(one);
  }
}

// Codes {0, 1} mean {-1, +1}, and {0, 1, 2} mean {-1, 0, +1}.
template <typename T, int kBits>
__global__ void unpack_kernel(const uint32_t* w_packed, T* w, int64_t N, int64_t K) {
  constexpr int kPerWord = 32 / kBits;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  constexpr float kStep = kBits == 1 ? 2.0f : 1.0f;
  const int64_t words = ceil_div(K, kPerWord);
  for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
    for (int64_t k = int64_t(blockIdx.y) * kThreads + threadIdx.x; k < K; k += int64_t(gridDim.y) * kThreads) {
      const uint32_t code = w_packed[n * words + k / kPerWord] >> (k % kPerWord * kBits) & kMask;
      w[n * K + k] = from_float<T>(kStep * static_cast<float>(code) - 1.0f);
    }
  }
}

template <int kBits>
void unpack(const uint32_t* w_packed, void* w, DType dtype, int64_t N, int64_t K, cudaStream_t stream) {
  constexpr int64_t kMostChunks = 1024;
  const Grid grid{dim3(blocks_for(N, 1), blocks_for(K, kThreads, kMostChunks)), kThreads};
  dispatch(dtype, [&](auto t) {
    launch(unpack_kernel<decltype(t), kBits>, grid, stream, w_packed, static_cast<decltype(t)*>(w), N, K);
  });
}

}  // namespace

void pack_sign(const void* w, DType dtype, uint32_t* w_packed, int64_t N, int64_t K, Executor stream) {
  const int64_t items = N * ceil_div(ceil_div(K, kSignsPerWord), kGroups);
  dispatch(dtype, [&](auto t) {
    launch(pack_sign_kernel<decltype(t)>, Grid{blocks_for(items, kWarps), kThreads}, stream,
           static_cast<const decltype(t)*>(w), w_packed, N, K);
  });
}

void pack_ternary(const void* w, const void* scale, DType dtype, uint32_t* w_packed, int64_t N, int64_t K,
                  Executor stream) {
  const int64_t items = N * ceil_div(ceil_div(K, kTernaryPerWord), 2 * kGroups);
  dispatch(dtype, [&](auto t) {
    launch(pack_ternary_kernel<decltype(t)>, Grid{blocks_for(items, kWarps), kThreads}, stream,
           static_cast<const decltype(t)*>(w), static_cast<const float*>(scale), w_packed, N, K);
  });
}

void unpack_sign(const uint32_t* w_packed, void* w, DType dtype, int64_t N, int64_t K, Executor stream) {
  unpack<1>(w_packed, w, dtype, N, K, stream);
}

void unpack_ternary(const uint32_t* w_packed, void* w, DType dtype, int64_t N, int64_t K, Executor stream) {
  unpack<2>(w_packed, w, dtype, N, K, stream);
}

}  // namespace bitkernels::cuda
