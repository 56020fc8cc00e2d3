// What every csrc/<op>.cpp shares: argument checks, allocation, the executor, registration.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "kernels.h"

// The dispatch key of the library being compiled.
#ifdef BITKERNELS_CUDA
#define BITKERNELS_DISPATCH_KEY CUDA
#else
#define BITKERNELS_DISPATCH_KEY CPU
#endif

namespace bitkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline auto shape(const Tensor& t) { return Shape{t.sizes()}; }

inline const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

// Dense row-major memory, copied only where it is not so already.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return dense(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

inline std::optional<Tensor> as_dtype(const std::optional<Tensor>& t, ScalarType dtype) {
  if (!t) return std::nullopt;
  return as_dtype(*t, dtype);
}

inline const void* data_or_null(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

inline void* mutable_data_or_null(const std::optional<Tensor>& t) { return t ? t->mutable_data_ptr() : nullptr; }

inline const uint32_t* words(const Tensor& w_packed) { return static_cast<const uint32_t*>(w_packed.const_data_ptr()); }

// Scales and biases are held in fp32, and in fp64 where the activations are fp64.
inline ScalarType scale_type(ScalarType activation) {
  return activation == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline DType kernel_dtype(const char* op, const char* argument, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
#ifndef BITKERNELS_CUDA
    case ScalarType::Double: return DType::kFloat64;
#endif
    default:
      check_argument(false, op, ": ", argument, " must be float32, bfloat16 or float16, got ", name_of(dtype));
      return DType::kFloat32;
  }
}

inline bool same_device(const Tensor& t, const Tensor& x) {
  return t.is_cuda() == x.is_cuda() && (!t.is_cuda() || t.get_device_index() == x.get_device_index());
}

inline void check_same_device(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  check_argument(same_device(t, x), op, ": ", argument, " must be on the device of the first argument");
}

inline void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType expected) {
  check_argument(t.scalar_type() == expected, op, ": ", argument, " must be ", name_of(expected), ", got ",
                 name_of(t.scalar_type()));
}

inline void check_floating(const char* op, const char* argument, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  check_argument(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                     dtype == ScalarType::Half,
                 op, ": ", argument, " must be a floating-point tensor, got ", name_of(dtype));
}

inline void check_shape(const char* op, const char* argument, const Tensor& t,
                        std::initializer_list<int64_t> expected) {
  check_argument(shape(t) == Shape{expected}, op, ": ", argument, " must be of shape ", Shape{expected}, ", got ",
                 shape(t));
}

inline void check_packed(const char* op, const Tensor& w_packed, int64_t K, int64_t per_word) {
  check_dtype(op, "w_packed", w_packed, ScalarType::UInt32);
  check_packed_shape(op, w_packed.sizes(), K, per_word);
}

// Sizes that come without a tensor.
inline void check_sizes(const char* op, int64_t M, int64_t N, int64_t K) {
  check_argument(M > 0 && N > 0 && K > 0, op, ": M, N and K must be positive, got ", M, ", ", N, " and ", K);
}

// Rows of a [..., width] tensor.
inline int64_t rows(const Tensor& t) {
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) n *= t.size(i);
  return n;
}

// The sizes of t with another last dimension.
inline std::vector<int64_t> sizes_with_last(const Tensor& t, int64_t width) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = width;
  return sizes;
}

// Scratch memory from torch's allocator, freed in stream order. None is not asked for, which takes a microsecond.
inline std::optional<Tensor> workspace_like(const Tensor& t, int64_t bytes) {
  if (bytes == 0) return std::nullopt;
  return torch::stable::new_empty(t, {bytes}, ScalarType::Byte);
}

// Makes the tensor's device current and hands the kernels what they run on: torch's current stream there, or torch's
// thread pool. Sizes of workspaces depend on the device, so it comes before they are asked for.
class Launch {
 public:
#ifdef BITKERNELS_CUDA
  explicit Launch(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#else
  explicit Launch(const Tensor&)
      : parallel_for_([](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
          torch::stable::parallel_for(0, n, grain, f);
        }) {}
  operator const ParallelFor&() const { return parallel_for_; }

 private:
  ParallelFor parallel_for_;
#endif
};

}  // namespace bitkernels
