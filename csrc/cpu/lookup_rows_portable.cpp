#include "lookup_rows_body.h"

namespace bitkernels::cpu {

template <>
const RowKernels<float>& row_kernels_portable() {
  return kRowKernels<float>;
}

template <>
const RowKernels<double>& row_kernels_portable() {
  return kRowKernels<double>;
}

}  // namespace bitkernels::cpu
