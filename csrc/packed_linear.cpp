// packed_linear and its backward: checks, allocation, dispatch.
#include "op.h"

namespace bitkernels {
namespace {

ScaleAxis scale_axis(const char* op, const Tensor& alpha, int64_t N, int64_t K) {
  const int64_t dim = alpha.dim();
  if (dim == 1 && alpha.size(0) == K) return ScaleAxis::kColumn;
  if (dim == 2 && alpha.size(0) == 1 && alpha.size(1) == K) return ScaleAxis::kColumn;
  if (dim == 2 && alpha.size(0) == N && alpha.size(1) == 1) return ScaleAxis::kRow;
  if (dim <= 1 && alpha.numel() == 1) return ScaleAxis::kSingle;
  check_argument(false, op, ": alpha must be of shape [", K, "] or [1, ", K, "] (column), [", N,
                  ", 1] (row) or [1] (single), got ", shape(alpha));
  return ScaleAxis::kSingle;
}

struct Problem {
  int64_t M, N, K;
  ScaleAxis axis;
};

// x or grad is [..., width]; the packed weight fixes N, and words fix K up to padding.
Problem check(const char* op, const Tensor& x, const Tensor& w_packed, const Tensor& alpha, const Tensor& beta) {
  check_argument(x.dim() >= 1, op, ": x must have at least one dimension");
  check_same_device(op, "w_packed", w_packed, x);
  check_same_device(op, "alpha", alpha, x);
  check_same_device(op, "beta", beta, x);
  check_dtype(op, "w_packed", w_packed, ScalarType::UInt32);
  check_argument(w_packed.dim() == 2, op, ": w_packed must be [N, ceil(K/32)], got ", shape(w_packed));
  const int64_t K = x.size(-1);
  const int64_t N = w_packed.size(0);
  check_argument(w_packed.size(1) == ceil_div(K, kSignsPerWord), op, ": w_packed must have ceil(K/32) = ",
                  ceil_div(K, kSignsPerWord), " words a row for x of K = ", K, ", got ", w_packed.size(1));
  const ScaleAxis axis = scale_axis(op, alpha, N, K);
  check_argument(shape(beta) == shape(alpha), op, ": beta must have alpha's shape ", shape(alpha), ", got ",
                  shape(beta));
  return {rows(x), N, K, axis};
}

Tensor packed_linear(const Tensor& x, const Tensor& w_packed, const Tensor& alpha, const Tensor& beta,
                     const std::optional<Tensor>& bias) {
  constexpr const char* op = "packed_linear";
  const DType dtype = kernel_dtype(op, "x", x.scalar_type());
  const Problem p = check(op, x, w_packed, alpha, beta);
  if (bias) {
    check_same_device(op, "bias", *bias, x);
    check_shape(op, "bias", *bias, {p.N});
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = p.N;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;

  const ScalarType scales = scale_type(x.scalar_type());
  const Tensor xd = dense(x), wd = dense(w_packed), ad = as_dtype(alpha, scales), bd = as_dtype(beta, scales);
  const std::optional<Tensor> bias_d = bias ? std::optional(as_dtype(*bias, scales)) : std::nullopt;
  BITKERNELS_BACKEND::PackedLinear args{
      xd.const_data_ptr(), static_cast<const uint32_t*>(wd.const_data_ptr()), ad.const_data_ptr(),
      bd.const_data_ptr(), bias_d ? bias_d->const_data_ptr() : nullptr, y.mutable_data_ptr(), nullptr, dtype, p.axis,
      p.M, p.N, p.K};
  const Tensor workspace = workspace_like(x, BITKERNELS_BACKEND::packed_linear_workspace(args));
  args.workspace = workspace.mutable_data_ptr();
  const Launch launch(x);
  BITKERNELS_BACKEND::packed_linear(args, launch);
  launch.check();
  return y;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, BITKERNELS_DISPATCH_KEY, m) {
  m.impl("packed_linear", TORCH_BOX(&bitkernels::packed_linear));
}
