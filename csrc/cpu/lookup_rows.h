// What a lookup matmul does to whole rows, before its tables are made and with the finished dot products.
#pragma once

#include "lookup.h"

namespace bitkernels::cpu {

template <typename T>
struct RowKernels {
  // out[k] = in_scale[k] v[k], K of them, v being row m of x, or its norm. Returns the sum of in_shift[k] v[k].
  T (*scale)(const LookupMatmul<T>&, int64_t m, T* out);
  // Asks memory for what store will read: pieces of many rows, which the hardware does not foresee.
  void (*expect)(const LookupMatmul<T>&, int64_t m, int64_t n0, int64_t columns);
  // Makes columns [n0, n0 + columns) of row m of y from dots[kPanelRows] and what scale returned.
  void (*store)(const LookupMatmul<T>&, int64_t m, int64_t n0, int64_t columns, const T* dots, T sum);
};

// Defined in lookup_rows_<path>.cpp.
template <typename T>
const RowKernels<T>& row_kernels_portable();
const RowKernels<float>& row_kernels_avx2();
const RowKernels<float>& row_kernels_avx512();

// For the machine this runs on.
template <typename T>
const RowKernels<T>& row_kernels();

}  // namespace bitkernels::cpu
