// quantize_int8, fake_quantize_int8: checks, allocation, dispatch.
#include <tuple>

#include "op.h"

namespace bitkernels {
namespace {

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& x) {
  constexpr const char* op = "quantize_int8";
  const DType dtype = kernel_dtype(op, "x", x.scalar_type());
  check_argument(x.dim() >= 1, op, ": x must have at least one dimension");
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor q = torch::stable::new_empty(x, sizes, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, {sizes.data(), sizes.size() - 1}, ScalarType::Float);
  if (scale.numel() == 0) return {q, scale};
  const Tensor xd = dense(x);
  const Launch launch(x);
  BITKERNELS_BACKEND::quantize_int8(xd.const_data_ptr(), dtype, static_cast<int8_t*>(q.mutable_data_ptr()),
                                    static_cast<float*>(scale.mutable_data_ptr()), rows(x), x.size(-1), launch);
  return {q, scale};
}

Tensor fake_quantize_int8(const Tensor& x) {
  constexpr const char* op = "fake_quantize_int8";
  const DType dtype = kernel_dtype(op, "x", x.scalar_type());
  check_argument(x.dim() >= 1, op, ": x must have at least one dimension");
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (y.numel() == 0) return y;
  const Tensor xd = dense(x);
  const Launch launch(x);
  BITKERNELS_BACKEND::fake_quantize_int8(xd.const_data_ptr(), y.mutable_data_ptr(), dtype, rows(x), x.size(-1), launch);
  return y;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, BITKERNELS_DISPATCH_KEY, m) {
  m.impl("quantize_int8", TORCH_BOX(&bitkernels::quantize_int8));
  m.impl("fake_quantize_int8", TORCH_BOX(&bitkernels::fake_quantize_int8));
}
