// head_step_hopper: whether the kernel can read the tensors as they are, and the call. What it cannot take, and what
// does not fit together, bitkernels/head_step.py takes with other operators.
#include "cuda/head_step_hopper.h"

#include "op.h"

// Without code for sm_90a it would launch kernels that do nothing.
#ifdef BITKERNELS_SM90A

namespace bitkernels {
namespace {

// Whether the kernel took it.
bool head_step_hopper(const Tensor& residual, const Tensor& norm_weight, const Tensor& weight, Tensor logits,
                      double eps) {
  const ScalarType dtype = weight.scalar_type();
  if (residual.size(0) != 1 || (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)) return false;
  for (const Tensor* t : {&residual, &norm_weight}) {
    if (t->scalar_type() != ScalarType::Float || !t->is_contiguous()) return false;
  }
  if (!weight.is_contiguous() || reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 != 0) return false;
  const cuda::HeadStep step{.residual = static_cast<const float*>(residual.const_data_ptr()),
                            .norm = static_cast<const float*>(norm_weight.const_data_ptr()),
                            .weight = weight.const_data_ptr(),
                            .logits = logits.mutable_data_ptr(),
                            .dtype = kernel_dtype("head_step", "weight", dtype),
                            .rows = weight.size(0),
                            .K = weight.size(1),
                            .eps = static_cast<float>(eps)};
  const Launch launch(residual);
  if (!cuda::head_step_fits(step)) return false;
  cuda::head_step(step, launch);
  return true;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CUDA, m) { m.impl("head_step_hopper", TORCH_BOX(&bitkernels::head_step_hopper)); }

#endif
