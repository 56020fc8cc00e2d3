#include "lookup_rows_body.h"

namespace bitkernels::cpu {

const RowKernels<float>& row_kernels_avx512() { return kRowKernels<float>; }

}  // namespace bitkernels::cpu
