// Operators on CUDA that others call past the dispatcher, with its arguments.
#pragma once

#include <tuple>

#include "op.h"

namespace bitkernels {

Tensor causal_conv1d_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& initial_state, const std::optional<Tensor>& seq_idx,
                          const std::optional<Tensor>& cu_seqlens, bool silu);
std::tuple<Tensor, Tensor> ssd_scan_cuda(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                         const Tensor& C, const std::optional<Tensor>& D,
                                         const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
                                         const std::optional<Tensor>& initial_states,
                                         const std::optional<Tensor>& seq_idx, const std::optional<Tensor>& cu_seqlens,
                                         bool dt_softplus, double dt_min, std::optional<double> dt_max,
                                         int64_t chunk_size);

}  // namespace bitkernels
