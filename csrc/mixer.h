// What the operators of the Mamba-2 block share above their kernels: strided views and options.
#pragma once

#include <limits>

#include "mixer_kernels.h"
#include "op.h"

namespace bitkernels {

// The tensor with its last axis dense; its other strides stay as they are, so that a slice of a wider
// projection is read where it lies.
inline Tensor inner_dense(const Tensor& t) {
  return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t);
}

// [B, T, ...]; `t` must outlive the view.
inline cpu::Strided strided(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.dim() > 2 ? t.stride(2) : 0};
}

// [B, ...]: one token.
inline cpu::Strided strided_token(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), 0, t.dim() > 1 ? t.stride(1) : 0};
}

inline void* mutable_data_or_null(const std::optional<Tensor>& t) { return t ? t->mutable_data_ptr() : nullptr; }

inline Tensor empty_gradient(const Tensor& like) {
  return torch::stable::new_empty(like, {0}, scale_type(like.scalar_type()));
}

inline void check_integer(const char* op, const char* argument, const Tensor& t) {
  check_argument(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, op, ": ", argument,
                 " must be int32 or int64, got ", name_of(t.scalar_type()));
}

inline void check_rank(const char* op, const char* argument, const Tensor& t, int64_t rank, const char* form) {
  check_argument(t.dim() == rank, op, ": ", argument, " must be ", form, ", got ", shape(t));
}

// A and what comes with it, common to the scan and the step.
inline void check_head_parameters(const char* op, const Tensor& x, const Tensor& A, const std::optional<Tensor>& D,
                                  const std::optional<Tensor>& dt_bias, int64_t H, int64_t P) {
  check_same_device(op, "A", A, x);
  check_floating(op, "A", A);
  check_shape(op, "A", A, {H});
  if (D) {
    check_same_device(op, "D", *D, x);
    check_floating(op, "D", *D);
    check_argument((D->dim() == 1 && D->size(0) == H) || (D->dim() == 2 && D->size(0) == H && D->size(1) == P), op,
                   ": D must be of shape [", H, "] or [", H, ", ", P, "], got ", shape(*D));
  }
  if (dt_bias) {
    check_same_device(op, "dt_bias", *dt_bias, x);
    check_floating(op, "dt_bias", *dt_bias);
    check_shape(op, "dt_bias", *dt_bias, {H});
  }
}

inline void check_groups(const char* op, const Tensor& B, int64_t groups, int64_t H) {
  check_argument(groups > 0 && H % groups == 0, op, ": B must have a number of groups that divides ", H, " heads, got ",
                 shape(B));
}

inline double limit_of(const char* op, double dt_min, std::optional<double> dt_max) {
  const double high = dt_max.value_or(std::numeric_limits<double>::infinity());
  check_argument(dt_min <= high, op, ": dt_limit must be increasing, got (", dt_min, ", ", high, ")");
  return high;
}

}  // namespace bitkernels
