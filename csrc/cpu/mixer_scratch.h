// What the files that share the Mamba-2 kernels among threads have in common.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "mixer_isa.h"

namespace bitkernels::cpu {

// Memory of one thread, in elements of acc, aligned to a cache line.
struct ScratchDeleter {
  void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<std::byte, ScratchDeleter>;

inline Scratch make_scratch(int64_t elements, DType dtype) {
  return Scratch(static_cast<std::byte*>(::operator new(elements * acc_size(dtype), std::align_val_t(64))));
}

}  // namespace bitkernels::cpu
