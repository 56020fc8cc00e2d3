// dense_linear: checks, allocation, dispatch. CUDA takes torch's product (bitkernels/dense_linear.py).
#include "op.h"

namespace bitkernels {
namespace {

Tensor dense_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale) {
  constexpr const char* op = "dense_linear";
  const DType dtype = kernel_dtype(op, "x", x.scalar_type());
  check_argument(x.dim() >= 1, op, ": x must have at least one dimension");
  check_same_device(op, "weight", weight, x);
  const int64_t K = x.size(-1);
  check_argument(weight.dim() == 2 && weight.size(1) == K, op, ": weight must be [N, ", K, "], got ", shape(weight));
  const int64_t N = weight.size(0);
  const bool int8 = weight.scalar_type() == ScalarType::Char;
  if (!int8) check_floating(op, "weight", weight);
  check_argument(int8 == scale.has_value(), op, ": scale must be given where and only where weight is int8, got ",
                 name_of(weight.scalar_type()));
  if (scale) {
    check_same_device(op, "scale", *scale, x);
    check_floating(op, "scale", *scale);
    check_shape(op, "scale", *scale, {N});
  }
  const ScalarType acc = scale_type(x.scalar_type());
  const bool wide = acc == ScalarType::Double || weight.scalar_type() == ScalarType::Double;
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, N));
  if (y.numel() == 0) return y;
  const Tensor xd = dense(x), wd = wide ? as_dtype(weight, acc) : dense(weight);
  const std::optional<Tensor> scales = as_dtype(scale, acc);
  const BITKERNELS_BACKEND::DenseLinear args{
      .x = xd.const_data_ptr(),
      .weight = wd.const_data_ptr(),
      .scale = data_or_null(scales),
      .y = y.mutable_data_ptr(),
      .dtype = dtype,
      .weight_dtype = int8 && !wide ? DType::kInt8 : kernel_dtype(op, "weight", wd.scalar_type()),
      .M = rows(x),
      .N = N,
      .K = K,
  };
  const Launch launch(x);
  BITKERNELS_BACKEND::dense_linear(args, launch);
  return y;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, BITKERNELS_DISPATCH_KEY, m) {
  m.impl("dense_linear", TORCH_BOX(&bitkernels::dense_linear));
}
