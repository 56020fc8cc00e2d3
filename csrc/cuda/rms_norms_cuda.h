// The forward of the norms of rows: after a sum, and gated. Their backwards run on Triton.
#pragma once

#include "kernels.h"

namespace bitkernels::cuda {

struct AddNorm {
  const float* residual;  // [rows, width] or null: zero
  const void* branch;     // [rows, width] dtype
  const void* weight;     // [width] weight_dtype
  float* total;           // [rows, width]
  void* normed;           // [rows, width] out_dtype
  DType dtype, weight_dtype, out_dtype;
  int64_t rows, width;
  float eps;
};
void add_norm(const AddNorm&, Executor);

struct GatedNorm {
  const void *x, *z;   // [rows, width] dtype, rows by strides
  const void* weight;  // [width] weight_dtype
  void* y;             // [rows, width] dtype
  DType dtype, weight_dtype;
  int64_t rows, width, group;  // neighbours that are normalised together
  int64_t x_row, z_row;
  float eps;
};
void gated_norm(const GatedNorm&, Executor);

}  // namespace bitkernels::cuda
