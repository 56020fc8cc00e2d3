// gated_rms_norm and its backward: checks, allocation, dispatch.
#include "mixer.h"

namespace bitkernels {
namespace {

// The kernel's description of the problem, and what keeps its pointers alive.
struct Norm {
  Tensor x, z, weight;
  cpu::GatedRmsNorm args;

  Norm(const char* op, const Tensor& x_in, const Tensor& z_in, const Tensor& weight_in, double eps,
       std::optional<int64_t> group_size)
      : x((check_gated_norm(op, x_in, z_in, weight_in, group_size), as_rows(x_in))),
        z(as_rows(z_in)),
        weight(as_dtype(weight_in, scale_type(x_in.scalar_type()))),
        args{.x = x.const_data_ptr(),
             .z = z.const_data_ptr(),
             .weight = weight.const_data_ptr(),
             .out = nullptr,
             .dtype = kernel_dtype(op, "x", x.scalar_type()),
             .eps = eps,
             .M = rows(x),
             .width = x.size(-1),
             .group_size = group_size.value_or(x.size(-1)),
             .x_row = row_stride(x),
             .z_row = row_stride(z)} {}
};

Tensor gated_rms_norm(const Tensor& x, const Tensor& z, const Tensor& weight, double eps,
                      std::optional<int64_t> group_size) {
  Norm norm("gated_rms_norm", x, z, weight, eps, group_size);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  if (out.numel() == 0) return out;
  norm.args.out = out.mutable_data_ptr();
  cpu::gated_rms_norm(norm.args, Launch(x));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& z,
                                                           const Tensor& weight, double eps,
                                                           std::optional<int64_t> group_size) {
  constexpr const char* op = "gated_rms_norm_backward";
  Norm norm(op, x, z, weight, eps, group_size);
  check_same_device(op, "dy", dy, x);
  check_dtype(op, "dy", dy, x.scalar_type());
  check_argument(shape(dy) == shape(x), op, ": dy must be of x's shape ", shape(x), ", got ", shape(dy));
  Tensor dx = torch::stable::new_empty(x, x.sizes()), dz = torch::stable::new_empty(x, x.sizes());
  Tensor dweight = torch::stable::new_empty(weight, weight.sizes(), scale_type(x.scalar_type()));
  const Tensor dy_rows = as_rows(dy);
  cpu::GatedRmsNormBackward args{.forward = norm.args,
                                 .dy = dy_rows.const_data_ptr(),
                                 .dy_row = row_stride(dy_rows),
                                 .dx = dx.mutable_data_ptr(),
                                 .dz = dz.mutable_data_ptr(),
                                 .dweight = dweight.mutable_data_ptr(),
                                 .workspace = nullptr};
  const std::optional<Tensor> workspace = workspace_like(x, cpu::gated_rms_norm_backward_workspace(args));
  args.workspace = mutable_data_or_null(workspace);
  cpu::gated_rms_norm_backward(args, Launch(x));
  return {dx, dz, dweight};
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CPU, m) {
  m.impl("gated_rms_norm", TORCH_BOX(&bitkernels::gated_rms_norm));
  m.impl("gated_rms_norm_backward", TORCH_BOX(&bitkernels::gated_rms_norm_backward));
}
