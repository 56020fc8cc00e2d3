#pragma once

#include <string>

#include "kernels.h"

namespace bitkernels::cpu {

// ternary_linear with int8 activations.
void ternary_linear_int8(const TernaryLinear&, Executor);
std::string explain_ternary_int8(const TernaryLinear&);

}  // namespace bitkernels::cpu
