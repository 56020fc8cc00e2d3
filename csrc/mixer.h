// What the operators of the Mamba-2 block share above their kernels: strided views and options.
#pragma once

#include <limits>
#include <vector>

#include "mixer_kernels.h"
#include "op.h"

namespace bitkernels {

// The tensor with its last axis dense; its other strides stay as they are, so that a slice of a wider
// projection is read where it lies.
inline Tensor inner_dense(const Tensor& t) {
  return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t);
}

// [B, T, ...]; `t` must outlive the view.
inline BITKERNELS_BACKEND::Strided strided(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.dim() > 2 ? t.stride(2) : 0};
}

// [B, ...]: one token.
inline BITKERNELS_BACKEND::Strided strided_token(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), 0, t.dim() > 1 ? t.stride(1) : 0};
}

inline Tensor empty_gradient(const Tensor& like) {
  return torch::stable::new_empty(like, {0}, scale_type(like.scalar_type()));
}

inline void check_integer(const char* op, const char* argument, const Tensor& t) {
  check_argument(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, op, ": ", argument,
                 " must be int32 or int64, got ", name_of(t.scalar_type()));
}

// [B] of every request.
inline void check_request(const char* op, const char* argument, const std::optional<Tensor>& t, int64_t batch,
                          const Tensor& x) {
  if (!t) return;
  check_same_device(op, argument, *t, x);
  check_dtype(op, argument, *t, ScalarType::Long);
  check_shape(op, argument, *t, {batch});
}

inline std::optional<Tensor> dense_integers(const std::optional<Tensor>& t) { return as_dtype(t, ScalarType::Long); }

// The slot of each of `batch` requests in a state of `slots`. On a GPU reading them would wait for it: there those that
// are too large are padding.
inline void check_slots(const char* op, const char* state, const Tensor& state_indices, int64_t batch, int64_t slots,
                        const Tensor& x) {
  check_same_device(op, "state_indices", state_indices, x);
  check_integer(op, "state_indices", state_indices);
  check_shape(op, "state_indices", state_indices, {batch});
#ifndef BITKERNELS_CUDA
  const Tensor dense = *dense_integers(state_indices);
  const int64_t* slot = static_cast<const int64_t*>(dense.const_data_ptr());
  for (int64_t i = 0; i < batch; ++i) {
    check_argument(slot[i] < slots, op, ": state_indices must be below the ", slots, " slots of ", state, ", got ",
                   slot[i]);
  }
#endif
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

// Weight and bias of a convolution over `channels`.
inline void check_taps(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       int64_t channels) {
  check_same_device(op, "weight", weight, x);
  check_floating(op, "weight", weight);
  check_argument(weight.dim() == 2 && weight.size(0) == channels && weight.size(1) >= 1, op,
                 ": weight must be of shape [", channels, ", W], got ", shape(weight));
  if (bias) {
    check_same_device(op, "bias", *bias, x);
    check_floating(op, "bias", *bias);
    check_shape(op, "bias", *bias, {channels});
  }
}

inline void check_gated_norm(const char* op, const Tensor& x, const Tensor& z, const Tensor& weight,
                             std::optional<int64_t> group_size) {
  kernel_dtype(op, "x", x.scalar_type());
  check_argument(x.dim() >= 1, op, ": x must have at least one dimension");
  check_same_device(op, "z", z, x);
  check_dtype(op, "z", z, x.scalar_type());
  check_argument(shape(z) == shape(x), op, ": z must be of x's shape ", shape(x), ", got ", shape(z));
  check_same_device(op, "weight", weight, x);
  check_floating(op, "weight", weight);
  check_shape(op, "weight", weight, {x.size(-1)});
  check_argument(!group_size || (*group_size > 0 && x.size(-1) % *group_size == 0), op,
                 ": group_size must divide the last axis of x, ", x.size(-1), ", got ", group_size.value_or(0));
}

// The tensor as rows of its last axis, one stride apart; copied only where the leading axes cannot be merged.
inline Tensor as_rows(const Tensor& t) {
  bool merges = t.size(-1) <= 1 || t.stride(-1) == 1;
  for (int64_t i = 0; i + 2 < t.dim(); ++i) {
    merges = merges && (t.size(i) == 1 || t.stride(i) == t.stride(i + 1) * t.size(i + 1));
  }
  return merges ? t : torch::stable::contiguous(t);
}

inline int64_t row_stride(const Tensor& t) { return t.dim() > 1 ? t.stride(-2) : t.size(-1); }

inline void check_groups(const char* op, const Tensor& B, int64_t groups, int64_t H) {
  check_argument(groups > 0 && H % groups == 0, op, ": B must have a number of groups that divides ", H, " heads, got ",
                 shape(B));
}

inline double limit_of(const char* op, double dt_min, std::optional<double> dt_max) {
  const double high = dt_max.value_or(std::numeric_limits<double>::infinity());
  check_argument(dt_min <= high, op, ": dt_limit must be increasing, got (", dt_min, ", ", high, ")");
  return high;
}

// The arguments of the scan, in the schema's order.
struct ScanArguments {
  const Tensor &x, &dt, &A, &B, &C;
  const std::optional<Tensor>&D, &z, &dt_bias, &initial_states, &seq_idx, &cu_seqlens;
  bool dt_softplus;
  double dt_min;
  std::optional<double> dt_max;
  int64_t chunk_size;
};

// All but cu_seqlens, and initial_states, whose number depends on them.
inline void check_scan(const char* op, const ScanArguments& a) {
  kernel_dtype(op, "x", a.x.scalar_type());
  check_rank(op, "x", a.x, 4, "[B, T, H, P]");
  const int64_t batch = a.x.size(0), T = a.x.size(1), H = a.x.size(2), P = a.x.size(3);
  check_argument(a.chunk_size > 0, op, ": chunk_size must be positive, got ", a.chunk_size);

  check_same_device(op, "dt", a.dt, a.x);
  check_floating(op, "dt", a.dt);
  check_shape(op, "dt", a.dt, {batch, T, H});
  check_same_device(op, "B", a.B, a.x);
  check_dtype(op, "B", a.B, a.x.scalar_type());
  check_rank(op, "B", a.B, 4, "[B, T, G, N]");
  check_shape(op, "B", a.B, {batch, T, a.B.size(2), a.B.size(3)});
  check_groups(op, a.B, a.B.size(2), H);
  check_same_device(op, "C", a.C, a.x);
  check_dtype(op, "C", a.C, a.x.scalar_type());
  check_shape(op, "C", a.C, {batch, T, a.B.size(2), a.B.size(3)});
  check_head_parameters(op, a.x, a.A, a.D, a.dt_bias, H, P);
  if (a.z) {
    check_same_device(op, "z", *a.z, a.x);
    check_dtype(op, "z", *a.z, a.x.scalar_type());
    check_shape(op, "z", *a.z, {batch, T, H, P});
  }
  if (a.seq_idx) {
    check_same_device(op, "seq_idx", *a.seq_idx, a.x);
    check_integer(op, "seq_idx", *a.seq_idx);
    check_shape(op, "seq_idx", *a.seq_idx, {batch, T});
  }
  limit_of(op, a.dt_min, a.dt_max);
}

inline void check_initial_states(const char* op, const ScanArguments& a, int64_t sequences) {
  if (!a.initial_states) return;
  check_same_device(op, "initial_states", *a.initial_states, a.x);
  check_floating(op, "initial_states", *a.initial_states);
  check_shape(op, "initial_states", *a.initial_states, {sequences, a.x.size(2), a.x.size(3), a.B.size(3)});
}

// Of their values nothing: on a GPU reading them would wait for it.
inline void check_cu_seqlens(const char* op, const Tensor& x, const Tensor& cu_seqlens) {
  check_same_device(op, "cu_seqlens", cu_seqlens, x);
  check_integer(op, "cu_seqlens", cu_seqlens);
  check_argument(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op, ": cu_seqlens must be [S + 1], got ",
                 shape(cu_seqlens));
  check_argument(x.size(0) == 1, op, ": x must have a batch of one with cu_seqlens, got ", shape(x));
}

// The rows of x [B, T, ...], or the sequences packed into its only row; chunks_of tells how many a length has.
inline std::vector<BITKERNELS_BACKEND::Sequence> sequences(const char* op, const Tensor& x,
                                                           const std::optional<Tensor>& cu_seqlens,
                                                           int64_t (*chunks_of)(int64_t)) {
  const int64_t batch = x.size(0), time = x.size(1);
  std::vector<BITKERNELS_BACKEND::Sequence> out;
  int64_t chunk = 0;
  auto add = [&](int64_t row, int64_t begin, int64_t length) {
    out.push_back({row, begin, length, chunk});
    chunk += chunks_of(length);
  };
  if (!cu_seqlens) {
    for (int64_t b = 0; b < batch; ++b) add(b, 0, time);
    return out;
  }
  check_cu_seqlens(op, x, *cu_seqlens);
  const Tensor ends = as_dtype(*cu_seqlens, ScalarType::Long);
  const int64_t* end = static_cast<const int64_t*>(ends.const_data_ptr());
  const int64_t count = ends.size(0) - 1;
  check_argument(end[0] == 0 && end[count] == time, op, ": cu_seqlens must run from 0 to T = ", time, ", got ", end[0],
                 " to ", end[count]);
  for (int64_t s = 0; s < count; ++s) {
    check_argument(end[s] <= end[s + 1], op, ": cu_seqlens must not decrease, got ", end[s], " before ", end[s + 1]);
    add(0, end[s], end[s + 1] - end[s]);
  }
  return out;
}

}  // namespace bitkernels
