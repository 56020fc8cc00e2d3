#include "lookup_rows.h"

#include "cpu_features.h"

namespace bitkernels::cpu {

template <>
const RowKernels<float>& row_kernels() {
  switch (path()) {
#if defined(__x86_64__)
    case Path::kAvx512: return row_kernels_avx512();
    case Path::kAvx2: return row_kernels_avx2();
#endif
    default: return row_kernels_portable<float>();
  }
}

template <>
const RowKernels<double>& row_kernels() {
  return row_kernels_portable<double>();
}

}  // namespace bitkernels::cpu
