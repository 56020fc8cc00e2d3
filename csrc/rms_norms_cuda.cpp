// add_rms_norm and gated_rms_norm on CUDA: checks, allocation, dispatch. Their backwards run on Triton.
#include "cuda/rms_norms_cuda.h"

#include "mixer.h"

namespace bitkernels {
namespace {

// Dense, of a type that kernels read.
Tensor weight_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? as_dtype(t, ScalarType::Float) : dense(t);
}

std::tuple<Tensor, Tensor> add_rms_norm(const std::optional<Tensor>& residual, const Tensor& branch,
                                        const Tensor& weight, double eps, ScalarType dtype) {
  constexpr const char* op = "add_rms_norm";
  const DType branch_dtype = kernel_dtype(op, "branch", branch.scalar_type());
  check_argument(branch.dim() >= 1, op, ": branch must have at least one dimension");
  check_same_device(op, "weight", weight, branch);
  check_floating(op, "weight", weight);
  check_shape(op, "weight", weight, {branch.size(-1)});
  if (residual) {
    check_same_device(op, "residual", *residual, branch);
    check_dtype(op, "residual", *residual, ScalarType::Float);
    check_argument(shape(*residual) == shape(branch), op, ": residual must be of shape ", shape(branch), ", got ",
                   shape(*residual));
  }
  Tensor total = torch::stable::new_empty(branch, branch.sizes(), ScalarType::Float);
  Tensor normed = torch::stable::new_empty(branch, branch.sizes(), dtype);
  if (branch.numel() == 0) return {total, normed};
  const Tensor branch_rows = dense(branch), weights = weight_of(weight);
  const std::optional<Tensor> residual_rows = as_dtype(residual, ScalarType::Float);
  cuda::add_norm({.residual = static_cast<const float*>(data_or_null(residual_rows)),
                  .branch = branch_rows.const_data_ptr(),
                  .weight = weights.const_data_ptr(),
                  .total = static_cast<float*>(total.mutable_data_ptr()),
                  .normed = normed.mutable_data_ptr(),
                  .dtype = branch_dtype,
                  .weight_dtype = kernel_dtype(op, "weight", weights.scalar_type()),
                  .out_dtype = kernel_dtype(op, "dtype", dtype),
                  .rows = rows(branch),
                  .width = branch.size(-1),
                  .eps = static_cast<float>(eps)},
                 Launch(branch));
  return {total, normed};
}

Tensor gated_rms_norm(const Tensor& x, const Tensor& z, const Tensor& weight, double eps,
                      std::optional<int64_t> group_size) {
  constexpr const char* op = "gated_rms_norm";
  check_gated_norm(op, x, z, weight, group_size);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (y.numel() == 0) return y;
  const Tensor x_rows = as_rows(x), z_rows = as_rows(z), weights = weight_of(weight);
  cuda::gated_norm({.x = x_rows.const_data_ptr(),
                    .z = z_rows.const_data_ptr(),
                    .weight = weights.const_data_ptr(),
                    .y = y.mutable_data_ptr(),
                    .dtype = kernel_dtype(op, "x", x.scalar_type()),
                    .weight_dtype = kernel_dtype(op, "weight", weights.scalar_type()),
                    .rows = rows(x),
                    .width = x.size(-1),
                    .group = group_size.value_or(x.size(-1)),
                    .x_row = row_stride(x_rows),
                    .z_row = row_stride(z_rows),
                    .eps = static_cast<float>(eps)},
                   Launch(x));
  return y;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CUDA, m) {
  m.impl("add_rms_norm", TORCH_BOX(&bitkernels::add_rms_norm));
  m.impl("gated_rms_norm", TORCH_BOX(&bitkernels::gated_rms_norm));
}
