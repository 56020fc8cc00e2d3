// sign_linear_weight_backward: checks, allocation, dispatch. sign_linear itself is made of other operators.
#include <tuple>

#include "op.h"

namespace bitkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> sign_linear_weight_backward(const Tensor& product, const Tensor& w_packed,
                                                               const Tensor& alpha, ScalarType weight_dtype,
                                                               bool need_weight, bool need_scales) {
  constexpr const char* op = "sign_linear_weight_backward";
  const DType dtype = kernel_dtype(op, "product", product.scalar_type());
  check_argument(product.dim() == 2, op, ": product must be [N, K], got ", shape(product));
  const int64_t N = product.size(0), K = product.size(1);
  check_same_device(op, "w_packed", w_packed, product);
  check_same_device(op, "alpha", alpha, product);
  check_floating(op, "alpha", alpha);
  check_packed(op, w_packed, K, kSignsPerWord);
  check_argument(w_packed.size(0) == N, op, ": w_packed must have N = ", N, " rows, got ", w_packed.size(0));
  const ScaleAxis axis = scale_axis(op, alpha.sizes(), N, K);
  const ScalarType scales = scale_type(product.scalar_type());

  const std::vector<int64_t> weight_sizes = need_weight ? std::vector<int64_t>{N, K} : std::vector<int64_t>{0};
  const int64_t sums = need_scales ? (axis == ScaleAxis::kColumn ? K : N) : 0;
  Tensor dweight = torch::stable::new_empty(product, weight_sizes, weight_dtype);
  Tensor dalpha = torch::stable::new_empty(product, {sums}, scales);
  Tensor dbeta = torch::stable::new_empty(product, {sums}, scales);
  if (product.numel() == 0) {
    for (Tensor* t : {&dalpha, &dbeta}) torch::stable::zero_(*t);
    return {dweight, dalpha, dbeta};
  }
  const Tensor pd = dense(product), wd = dense(w_packed), ad = as_dtype(alpha, scales);
  BITKERNELS_BACKEND::SignLinearWeightBackward args{
      .product = pd.const_data_ptr(),
      .w_packed = words(wd),
      .alpha = ad.const_data_ptr(),
      .dweight = need_weight ? dweight.mutable_data_ptr() : nullptr,
      .dalpha = need_scales ? dalpha.mutable_data_ptr() : nullptr,
      .dbeta = need_scales ? dbeta.mutable_data_ptr() : nullptr,
      .workspace = nullptr,
      .dtype = dtype,
      .weight_dtype = kernel_dtype(op, "weight_dtype", weight_dtype),
      .axis = axis,
      .N = N,
      .K = K,
  };
  const Launch launch(product);
  const std::optional<Tensor> workspace =
      workspace_like(product, BITKERNELS_BACKEND::sign_linear_weight_backward_workspace(args));
  args.workspace = mutable_data_or_null(workspace);
  BITKERNELS_BACKEND::sign_linear_weight_backward(args, launch);
  return {dweight, dalpha, dbeta};
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, BITKERNELS_DISPATCH_KEY, m) {
  m.impl("sign_linear_weight_backward", TORCH_BOX(&bitkernels::sign_linear_weight_backward));
}
