#pragma once

#include "kernels.h"

namespace bitkernels::cpu {

// Quantises row `row` of x [M, K] into q [K] and returns its scale.
float quantize_int8_row(const void* x, DType dtype, int64_t row, int8_t* q, int64_t K);

}  // namespace bitkernels::cpu
