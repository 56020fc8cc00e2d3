#pragma once

#include "lookup.h"

namespace bitkernels::cpu {

// packed_linear's product, for what does more to its rows. T is double where the dtype is kFloat64, float otherwise.
template <typename T>
LookupMatmul<T> packed_product(const PackedLinear&);

}  // namespace bitkernels::cpu
