// Sums over the rows of two matrices of partial sums, in a fixed order.
#pragma once

#include "launch.cuh"
#include "ptx.cuh"

namespace bitkernels::cuda {

// first[k] and second[k]: one lane a column, the warps of a block every eighth row.
static __global__ void __launch_bounds__(256)
    add_rows_kernel(const float* first_rows, const float* second_rows, int64_t rows, int64_t columns, float* first,
                    float* second) {
  __shared__ float scratch[2][8][32];
  wait_for_previous_kernel();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t k = int64_t(blockIdx.x) * 32 + lane;
  float a = 0.0f;
  float b = 0.0f;
  for (int64_t row = warp; row < rows && k < columns; row += 8) {
    a += first_rows[row * columns + k];
    b += second_rows[row * columns + k];
  }
  scratch[0][warp][lane] = a;
  scratch[1][warp][lane] = b;
  __syncthreads();
  if (warp != 0 || k >= columns) return;
  for (int i = 1; i < 8; ++i) {
    a += scratch[0][i][lane];
    b += scratch[1][i][lane];
  }
  first[k] = a;
  second[k] = b;
}

inline void add_rows(const float* first_rows, const float* second_rows, int64_t rows, int64_t columns, float* first,
                     float* second, cudaStream_t stream) {
  launch(add_rows_kernel, Grid{dim3(blocks_for(columns, 32)), 256, 0, true}, stream, first_rows, second_rows, rows,
         columns, first, second);
}

}  // namespace bitkernels::cuda
