// What comes before the kernels of the backward scan where its outputs are gated, y silu(z): the gradient of y, which
// is all that they know of, and dz. dD is found here too, from what is not rounded yet.
#pragma once

#include "reduce.cuh"
#include "scan_layout.cuh"
#include "scan_state.cuh"

namespace bitkernels::cuda {

constexpr int kGateThreads = 256;

struct GateProblem {
  ScanTensor dy, x, z;  // [B, T, H, 64]
  const void* y;        // [B, T, H, 64] without the gate
  void *of_y, *dz;      // [B, T, H, 64]
  float* dD;            // [B, blocks, H] parts of it
  int T, H;
};

// Thread blocks are by blocks of 64 tokens, heads and rows.
template <typename T>
__global__ void __launch_bounds__(kGateThreads) gate_kernel(GateProblem p) {
  constexpr int kPieces = kHeaddim / 8;  // of 16 bytes, of a token
  __shared__ float scratch[kGateThreads / 32];
  const int head = blockIdx.y, row = blockIdx.z;
  const auto piece = [&](const ScanTensor& t, int64_t token, int column) {
    const int64_t at = row * t.batch + token * t.time + head * t.head + column;
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(t.data) + at);
  };
  float skip = 0.0f;
#pragma unroll
  for (int i = threadIdx.x; i < kScanTokens * kPieces; i += kGateThreads) {
    const int token = blockIdx.x * kScanTokens + i / kPieces, column = i % kPieces * 8;
    if (token >= p.T) break;
    const int64_t at = ((int64_t(row) * p.T + token) * p.H + head) * kHeaddim + column;
    const uint4 dy = piece(p.dy, token, column), x = piece(p.x, token, column), z = piece(p.z, token, column);
    const uint4 y = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.y) + at);
    uint4 of_y, dz;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto word = [&](const uint4& v) { return unpack_pair(T(), reinterpret_cast<const uint32_t*>(&v)[j]); };
      const float2 dy_j = word(dy), x_j = word(x), y_j = word(y), z_j = word(z);
      const float2 open = {1.0f / (1.0f + __expf(-z_j.x)), 1.0f / (1.0f + __expf(-z_j.y))};
      const float2 given = {dy_j.x * z_j.x * open.x, dy_j.y * z_j.y * open.y};
      skip += given.x * x_j.x + given.y * x_j.y;
      reinterpret_cast<uint32_t*>(&of_y)[j] = pack_pair(T(), given.x, given.y);
      reinterpret_cast<uint32_t*>(&dz)[j] = pack_pair(T(), dy_j.x * y_j.x * open.x * (1.0f + z_j.x * (1.0f - open.x)),
                                                      dy_j.y * y_j.y * open.y * (1.0f + z_j.y * (1.0f - open.y)));
    }
    *reinterpret_cast<uint4*>(static_cast<T*>(p.of_y) + at) = of_y;
    *reinterpret_cast<uint4*>(static_cast<T*>(p.dz) + at) = dz;
  }
  skip = block_reduce(skip, Sum(), scratch);
  if (threadIdx.x == 0) p.dD[(int64_t(row) * gridDim.x + blockIdx.x) * p.H + head] = skip;
}

}  // namespace bitkernels::cuda
