#pragma once

#include <cstdint>
#include <new>

namespace bitkernels::cpu {

// Uninitialised scratch memory, aligned for every vector register.
template <typename T>
struct Buffer {
  explicit Buffer(int64_t n) : data(static_cast<T*>(::operator new[](n * sizeof(T), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete[](data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* const data;
};

}  // namespace bitkernels::cpu
