// pack_sign, unpack_sign, pack_ternary, unpack_ternary: checks, allocation, dispatch.
#include "op.h"

namespace bitkernels {
namespace {

// Ternary weights also come as int8, already in {-1, 0, 1}.
DType ternary_dtype(const char* op, const char* argument, ScalarType dtype) {
  return dtype == ScalarType::Char ? DType::kInt8 : kernel_dtype(op, argument, dtype);
}

Tensor new_packed(const char* op, const Tensor& w, int64_t per_word) {
  check_argument(w.dim() == 2, op, ": w must be [N, K], got ", shape(w));
  return torch::stable::new_empty(w, {w.size(0), ceil_div(w.size(1), per_word)}, ScalarType::UInt32);
}

template <typename Kernel>
Tensor unpack(const char* op, const Tensor& w_packed, int64_t K, ScalarType type, DType dtype, int64_t per_word,
              const Kernel& kernel) {
  check_argument(K >= 0, op, ": K must not be negative, got ", K);
  check_packed(op, w_packed, K, per_word);
  const int64_t N = w_packed.size(0);
  Tensor w = torch::stable::new_empty(w_packed, {N, K}, type);
  if (w.numel() == 0) return w;
  const Tensor wd = dense(w_packed);
  const Launch launch(w_packed);
  kernel(words(wd), w.mutable_data_ptr(), dtype, N, K, launch);
  return w;
}

Tensor pack_sign(const Tensor& w) {
  constexpr const char* op = "pack_sign";
  const DType dtype = kernel_dtype(op, "w", w.scalar_type());
  Tensor packed = new_packed(op, w, kSignsPerWord);
  if (packed.numel() == 0) return packed;
  const Tensor wd = dense(w);
  const Launch launch(w);
  BITKERNELS_BACKEND::pack_sign(wd.const_data_ptr(), dtype, static_cast<uint32_t*>(packed.mutable_data_ptr()),
                                w.size(0), w.size(1), launch);
  return packed;
}

Tensor unpack_sign(const Tensor& w_packed, int64_t K, ScalarType dtype) {
  constexpr const char* op = "unpack_sign";
  return unpack(op, w_packed, K, dtype, kernel_dtype(op, "dtype", dtype), kSignsPerWord,
                BITKERNELS_BACKEND::unpack_sign);
}

Tensor pack_ternary(const Tensor& w, const std::optional<Tensor>& scale) {
  constexpr const char* op = "pack_ternary";
  const DType dtype = ternary_dtype(op, "w", w.scalar_type());
  if (scale) {
    check_same_device(op, "scale", *scale, w);
    check_floating(op, "scale", *scale);
    check_argument(scale->numel() == 1, op, ": scale must be of shape [1], got ", shape(*scale));
  }
  Tensor packed = new_packed(op, w, kTernaryPerWord);
  if (packed.numel() == 0) return packed;
  const Tensor wd = dense(w);
  const std::optional<Tensor> sd = as_dtype(scale, scale_type(w.scalar_type()));
  const Launch launch(w);
  BITKERNELS_BACKEND::pack_ternary(wd.const_data_ptr(), data_or_null(sd), dtype,
                                   static_cast<uint32_t*>(packed.mutable_data_ptr()), w.size(0), w.size(1), launch);
  return packed;
}

Tensor unpack_ternary(const Tensor& w_packed, int64_t K, ScalarType dtype) {
  constexpr const char* op = "unpack_ternary";
  return unpack(op, w_packed, K, dtype, ternary_dtype(op, "dtype", dtype), kTernaryPerWord,
                BITKERNELS_BACKEND::unpack_ternary);
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, BITKERNELS_DISPATCH_KEY, m) {
  m.impl("pack_sign", TORCH_BOX(&bitkernels::pack_sign));
  m.impl("unpack_sign", TORCH_BOX(&bitkernels::unpack_sign));
  m.impl("pack_ternary", TORCH_BOX(&bitkernels::pack_ternary));
  m.impl("unpack_ternary", TORCH_BOX(&bitkernels::unpack_ternary));
}
