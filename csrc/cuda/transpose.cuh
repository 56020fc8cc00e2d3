// Packed weights transposed, [N, words of K] to [K, words of N]: the backward matmuls then are forward ones. Rows are
// padded with zero weights to whole 16-byte vectors, whatever N is.
#pragma once

#include "format.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace bitkernels::cuda {

// The low 16 bits, spread to every other bit.
__device__ inline uint32_t spread_bits(uint32_t v) {
  v = (v | v << 8) & 0x00ff00ff;
  v = (v | v << 4) & 0x0f0f0f0f;
  v = (v | v << 2) & 0x33333333;
  return (v | v << 1) & 0x55555555;
}

constexpr int kTransposeWarps = 8;                    // each takes 32 rows
constexpr int kTransposeRows = 32 * kTransposeWarps;  // of a block, which takes as many words of each
constexpr int kTransposeWords = 8;

// Words of a transposed row.
template <int kBits>
__host__ __device__ constexpr int64_t transposed_words(int64_t N) {
  return ceil_div(ceil_div(N, 32 / kBits), 4) * 4;
}

// Codes of kBits. A warp votes on the bits of a column of 32 rows; what all warps found leaves as runs of words.
template <int kBits>
__global__ void __launch_bounds__(32 * kTransposeWarps)
    transpose_kernel(const uint32_t* packed, uint32_t* transposed, int64_t N, int64_t K) {
  constexpr int kPerWord = 32 / kBits;
  constexpr int kColumns = kTransposeWords * kPerWord;  // of a block
  constexpr int kRowWords = kTransposeRows / kPerWord;  // that these rows make
  constexpr uint32_t kZeroWeights = kBits == 1 ? 0 : 0x55555555;
  __shared__ uint32_t found[kColumns][kRowWords + 1];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t words = ceil_div(K, kPerWord);
  const int64_t out_words = transposed_words<kBits>(N);
  const int64_t n = int64_t(blockIdx.x) * kTransposeRows + warp * 32 + lane;
  const int64_t first_word = int64_t(blockIdx.y) * kTransposeWords;
  uint32_t mine[kTransposeWords];
#pragma unroll
  for (int w = 0; w < kTransposeWords; ++w) {
    mine[w] = n < N && first_word + w < words ? packed[n * words + first_word + w] : kZeroWeights;
  }
#pragma unroll
  for (int w = 0; w < kTransposeWords; ++w) {
    // Lane i keeps what is found for code i.
    uint32_t low = 0;
    uint32_t high = 0;
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) {
      const uint32_t low_bits = __ballot_sync(0xffffffff, mine[w] >> kBits * i & 1);
      if (lane == i) low = low_bits;
      if constexpr (kBits == 2) {
        const uint32_t high_bits = __ballot_sync(0xffffffff, mine[w] >> (kBits * i + 1) & 1);
        if (lane == i) high = high_bits;
      }
    }
    if constexpr (kBits == 1) {
      found[w * kPerWord + lane][warp] = low;
    } else if (lane < kPerWord) {
      found[w * kPerWord + lane][2 * warp] = spread_bits(low & 0xffff) | spread_bits(high & 0xffff) << 1;
      found[w * kPerWord + lane][2 * warp + 1] = spread_bits(low >> 16) | spread_bits(high >> 16) << 1;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns * kRowWords; i += blockDim.x) {
    const int64_t k = first_word * kPerWord + i / kRowWords;
    const int64_t word = int64_t(blockIdx.x) * kRowWords + i % kRowWords;
    if (k < K && word < out_words) transposed[k * out_words + word] = found[i / kRowWords][i % kRowWords];
  }
}

template <int kBits>
int64_t transposed_bytes(int64_t N, int64_t K) {
  return ceil_div(K * transposed_words<kBits>(N) * int64_t(sizeof(uint32_t)), 256) * 256;
}

template <int kBits>
void transpose_packed(const uint32_t* packed, uint32_t* transposed, int64_t N, int64_t K, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(ceil_div(N, kTransposeRows)),
                    static_cast<unsigned>(ceil_div(ceil_div(K, 32 / kBits), kTransposeWords)));
  launch(transpose_kernel<kBits>, Grid{blocks, 32 * kTransposeWarps}, stream, packed, transposed, N, K);
}

}  // namespace bitkernels::cuda
