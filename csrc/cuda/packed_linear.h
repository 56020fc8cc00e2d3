// packed_linear for the kernels of other operators.
#pragma once

#include "kernels.h"

namespace bitkernels::cuda {

// Of rows that an RMSNorm goes over first, where the product takes them along: then p.x is not read, but x, which is
// fp32 or of p.dtype. False: nothing was done.
bool normed_packed_linear(const PackedLinear& p, const void* x, DType x_dtype, const float* norm_weight, float eps,
                          Executor stream);

}  // namespace bitkernels::cuda
