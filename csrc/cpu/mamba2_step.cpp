// The steps on either side of the state: a product whose rows are normalised before, and convolved or summed after.
#include "packed_linear.h"

namespace bitkernels::cpu {
namespace {

template <typename T>
LookupMatmul<T> normed_product(const PackedLinear& linear, const void* norm_weight, double eps) {
  LookupMatmul<T> product = packed_product<T>(linear);
  product.norm_weight = static_cast<const T*>(norm_weight);
  product.eps = eps;
  return product;
}

template <typename T>
void in_step(const Mamba2InStep& p, Executor run) {
  LookupMatmul<T> product = normed_product<T>(p.linear, p.norm_weight, p.eps);
  product.wide_x = true;
  if (p.conv.channels > 0) product.conv = &p.conv;
  lookup_matmul(product, run);
}

template <typename T>
void out_step(const Mamba2OutStep& p, Executor run) {
  LookupMatmul<T> product = normed_product<T>(p.linear, p.norm_weight, p.eps);
  product.y = p.residual;
  product.added = true;
  lookup_matmul(product, run);
}

}  // namespace

int64_t mamba2_in_step_workspace(const Mamba2InStep&) { return 0; }

void mamba2_in_step(const Mamba2InStep& p, Executor run) {
  p.linear.dtype == DType::kFloat64 ? in_step<double>(p, run) : in_step<float>(p, run);
}

int64_t mamba2_out_step_workspace(const Mamba2OutStep&) { return 0; }

void mamba2_out_step(const Mamba2OutStep& p, Executor run) {
  p.linear.dtype == DType::kFloat64 ? out_step<double>(p, run) : out_step<float>(p, run);
}

}  // namespace bitkernels::cpu
