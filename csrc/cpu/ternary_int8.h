#pragma once

#include "kernels.h"

namespace bitkernels::cpu {

// ternary_linear with int8 activations.
void ternary_linear_int8(const TernaryLinear&, Executor);

}  // namespace bitkernels::cpu
