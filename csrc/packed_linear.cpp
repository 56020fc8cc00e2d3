// packed_linear and its backward: checks, allocation, dispatch.
#include <tuple>

#include "op.h"

namespace bitkernels {
namespace {

struct Problem {
  DType dtype;
  ScalarType scales;
  ScaleAxis axis;
  int64_t M, N, K;
};

Problem check(const char* op, const Tensor& x, const Tensor& w_packed, const Tensor& alpha, const Tensor& beta) {
  const DType dtype = kernel_dtype(op, "x", x.scalar_type());
  check_argument(x.dim() >= 1, op, ": x must have at least one dimension");
  check_same_device(op, "w_packed", w_packed, x);
  check_same_device(op, "alpha", alpha, x);
  check_same_device(op, "beta", beta, x);
  check_floating(op, "alpha", alpha);
  check_floating(op, "beta", beta);
  const int64_t K = x.size(-1);
  check_packed(op, w_packed, K, kSignsPerWord);
  const int64_t N = w_packed.size(0);
  const ScaleAxis axis = scale_axis(op, alpha.sizes(), N, K);
  check_argument(shape(beta) == shape(alpha), op, ": beta must have alpha's shape ", shape(alpha), ", got ",
                 shape(beta));
  return {dtype, scale_type(x.scalar_type()), axis, rows(x), N, K};
}

Tensor packed_linear(const Tensor& x, const Tensor& w_packed, const Tensor& alpha, const Tensor& beta,
                     const std::optional<Tensor>& bias) {
  constexpr const char* op = "packed_linear";
  const Problem p = check(op, x, w_packed, alpha, beta);
  if (bias) {
    check_same_device(op, "bias", *bias, x);
    check_floating(op, "bias", *bias);
    check_shape(op, "bias", *bias, {p.N});
  }
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, p.N));
  if (y.numel() == 0) return y;

  const Tensor xd = dense(x), wd = dense(w_packed), ad = as_dtype(alpha, p.scales), bd = as_dtype(beta, p.scales);
  const std::optional<Tensor> bias_d = as_dtype(bias, p.scales);
  BITKERNELS_BACKEND::PackedLinear args{
      .x = xd.const_data_ptr(),
      .w_packed = words(wd),
      .alpha = ad.const_data_ptr(),
      .beta = bd.const_data_ptr(),
      .bias = data_or_null(bias_d),
      .y = y.mutable_data_ptr(),
      .workspace = nullptr,
      .dtype = p.dtype,
      .axis = p.axis,
      .M = p.M,
      .N = p.N,
      .K = p.K,
  };
  const Launch launch(x);
  const std::optional<Tensor> workspace = workspace_like(x, BITKERNELS_BACKEND::packed_linear_workspace(args));
  args.workspace = mutable_data_or_null(workspace);
  BITKERNELS_BACKEND::packed_linear(args, launch);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> packed_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& w_packed,
                                                          const Tensor& alpha, const Tensor& beta, bool scale_grads) {
  constexpr const char* op = "packed_linear_backward";
  const Problem p = check(op, x, w_packed, alpha, beta);
  check_same_device(op, "grad", grad, x);
  check_dtype(op, "grad", grad, x.scalar_type());
  const std::vector<int64_t> grad_sizes = sizes_with_last(x, p.N);
  check_argument(shape(grad) == Shape{grad_sizes}, op, ": grad must be of shape ", Shape{grad_sizes}, ", got ",
                 shape(grad));
  const bool sums = scale_grads && p.axis == ScaleAxis::kColumn;
  Tensor dx = torch::stable::new_empty(x, sizes_with_last(x, p.K));
  const std::vector<int64_t> scale_sizes =
      sums ? std::vector<int64_t>(alpha.sizes().begin(), alpha.sizes().end()) : std::vector<int64_t>{0};
  Tensor dalpha = torch::stable::new_empty(alpha, scale_sizes, p.scales);
  Tensor dbeta = torch::stable::new_empty(alpha, scale_sizes, p.scales);
  if (p.M == 0 || p.N == 0 || p.K == 0) {
    for (Tensor* t : {&dx, &dalpha, &dbeta}) torch::stable::zero_(*t);
  } else {
    const Tensor gd = dense(grad), xd = dense(x), wd = dense(w_packed);
    const Tensor ad = as_dtype(alpha, p.scales), bd = as_dtype(beta, p.scales);
    BITKERNELS_BACKEND::PackedLinearBackward args{
        .grad = gd.const_data_ptr(),
        .x = xd.const_data_ptr(),
        .w_packed = words(wd),
        .alpha = ad.const_data_ptr(),
        .beta = bd.const_data_ptr(),
        .dx = dx.mutable_data_ptr(),
        .dalpha = sums ? dalpha.mutable_data_ptr() : nullptr,
        .dbeta = sums ? dbeta.mutable_data_ptr() : nullptr,
        .workspace = nullptr,
        .dtype = p.dtype,
        .axis = p.axis,
        .M = p.M,
        .N = p.N,
        .K = p.K,
    };
    const Launch launch(x);
    const std::optional<Tensor> workspace =
        workspace_like(x, BITKERNELS_BACKEND::packed_linear_backward_workspace(args));
    args.workspace = mutable_data_or_null(workspace);
    BITKERNELS_BACKEND::packed_linear_backward(args, launch);
  }
  return {dx, as_dtype(dalpha, alpha.scalar_type()), as_dtype(dbeta, alpha.scalar_type())};
}

// A stand-in for scales, of which only the presence counts.
constexpr float kPresent = 1.0f;

std::string explain_packed_linear(const Tensor& like, int64_t M, int64_t N, int64_t K, const std::string& scales) {
  constexpr const char* op = "explain";
  check_sizes(op, M, N, K);
  check_argument(scales == "column" || scales == "row" || scales == "single", op,
                 ": scales must be column, row or single, got ", scales);
  const Launch launch(like);
  return BITKERNELS_BACKEND::explain(BITKERNELS_BACKEND::PackedLinear{
      .x = nullptr,
      .w_packed = nullptr,
      .alpha = &kPresent,
      .beta = &kPresent,
      .bias = nullptr,
      .y = nullptr,
      .workspace = nullptr,
      .dtype = kernel_dtype(op, "dtype", like.scalar_type()),
      .axis = scales == "column" ? ScaleAxis::kColumn
              : scales == "row"  ? ScaleAxis::kRow
                                 : ScaleAxis::kSingle,
      .M = M,
      .N = N,
      .K = K,
  });
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, BITKERNELS_DISPATCH_KEY, m) {
  m.impl("packed_linear", TORCH_BOX(&bitkernels::packed_linear));
  m.impl("explain_packed_linear", TORCH_BOX(&bitkernels::explain_packed_linear));
  m.impl("packed_linear_backward", TORCH_BOX(&bitkernels::packed_linear_backward));
}
