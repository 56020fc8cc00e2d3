// Sizes of the convolution's tiles, the same for every instruction set.
#pragma once

#include "../mixer_kernels.h"

namespace bitkernels::cpu {
namespace {  // each instruction set compiles its own

// A tile of inputs and gradients stays in the first-level cache.
constexpr int64_t kConvTime = 32;
constexpr int64_t kConvChannels = 64;

// In elements of acc.
inline int64_t conv_scratch(int64_t W) { return (2 * kConvTime + 5 * W + 2) * kConvChannels; }

}  // namespace
}  // namespace bitkernels::cpu
