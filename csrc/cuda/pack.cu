// Packing and unpacking: the natural layout, least significant bit first along K.
#include <type_traits>

#include "launch.cuh"
#include "vectors.cuh"

namespace bitkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Pieces of eight weights that a lane asks for at once.
constexpr int kBatch = 4;

// A warp takes a row, a lane eight neighbouring weights at a time: a byte of signs, or two of ternary codes.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const T* w, const float* scale, uint32_t* w_packed, int64_t N, int64_t K, bool vector) {
  using Codes = std::conditional_t<kBits == 1, uint8_t, uint16_t>;
  constexpr int64_t kPiece = 32 * kEight;
  const int lane = threadIdx.x % 32;
  const int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (n >= N) return;
  const int64_t words = ceil_div(K, 32 / kBits);
  Codes* out = reinterpret_cast<Codes*>(w_packed + n * words);
  const float factor = scale ? __frcp_rn(*scale) : 1.0f;
  for (int64_t first = lane * kEight; first < words * (32 / kBits); first += kBatch * kPiece) {
    Eight<T> in[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) in[i] = load_eight(w + n * K, first + i * kPiece, K, vector);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t k = first + i * kPiece;
      uint32_t codes = 0;
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        const float v = to_float(in[i].e[e]);
        if constexpr (kBits == 1) {
          codes |= uint32_t(v >= 0.0f && k + e < K) << e;
        } else {
          // Halves round to even, so +-0.5 is zero.
          const float scaled = __fmul_rn(v, factor);
          codes |= (1u + (scaled > 0.5f) - (scaled < -0.5f)) << 2 * e;
        }
      }
      if (k < words * (32 / kBits)) out[k / kEight] = static_cast<Codes>(codes);
    }
  }
}

template <int kBits>
void pack(const void* w, const float* scale, DType dtype, uint32_t* w_packed, int64_t N, int64_t K,
          cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const T* weights = static_cast<const T*>(w);
    launch(pack_kernel<T, kBits>, Grid{dim3(static_cast<unsigned>(ceil_div(N, kWarps))), kThreads}, stream, weights,
           scale, w_packed, N, K, in_vectors(weights, K));
  });
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
  pack<1>(w, nullptr, dtype, w_packed, N, K, stream);
}

void pack_ternary(const void* w, const void* scale, DType dtype, uint32_t* w_packed, int64_t N, int64_t K,
                  Executor stream) {
  pack<2>(w, static_cast<const float*>(scale), dtype, w_packed, N, K, stream);
}

void unpack_sign(const uint32_t* w_packed, void* w, DType dtype, int64_t N, int64_t K, Executor stream) {
  unpack<1>(w_packed, w, dtype, N, K, stream);
}

void unpack_ternary(const uint32_t* w_packed, void* w, DType dtype, int64_t N, int64_t K, Executor stream) {
  unpack<2>(w_packed, w, dtype, N, K, stream);
}

}  // namespace bitkernels::cuda
