// The head of a decode step's one token, for Hopper. What it does not take, other operators do
// (bitkernels/head_step.py).
#pragma once

#include "kernels.h"

namespace bitkernels::cuda {

struct HeadStep {
  const float *residual, *norm;  // [K]
  const void* weight;            // [rows, K] dtype, 16 bits
  void* logits;                  // [rows] dtype
  DType dtype;
  int64_t rows, K;
  float eps;
};
// Whether the current device's kernel takes it; pointers may still be null.
bool head_step_fits(const HeadStep&);
void head_step(const HeadStep&, Executor);

}  // namespace bitkernels::cuda
