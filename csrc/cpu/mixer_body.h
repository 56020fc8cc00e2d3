// Every Mamba-2 kernel for the instruction set of the file that includes this.
#pragma once

#include "causal_conv1d_body.h"
#include "dense_linear_body.h"
#include "gated_rms_norm_body.h"
#include "mixer_isa.h"
#include "ssd_scan_backward_body.h"
#include "ssd_step_body.h"

namespace bitkernels::cpu {
namespace {

template <typename E>
void step_any_state(const SsdStep& p, int64_t batch, int64_t head) {
  if constexpr (std::is_same_v<E, double>) {
    step_head<E, double>(p, batch, head);
  } else {
    switch (p.state_dtype) {
      case DType::kBFloat16: return step_head<E, BFloat16>(p, batch, head);
      case DType::kFloat16: return step_head<E, Float16>(p, batch, head);
      default: return step_head<E, float>(p, batch, head);
    }
  }
}

template <typename E>
constexpr MixerKernels kMixerKernels = {
    scan_group_tiles<E, AccOf<E>>,
    scan_heads<E, AccOf<E>>,
    scan_block_backward<E, AccOf<E>>,
    scan_sum_blocks<E, AccOf<E>>,
    scan_sum_sequences<AccOf<E>>,
    step_any_state<E>,
    conv_rows<E, AccOf<E>>,
    conv_rows_backward<E, AccOf<E>>,
    conv_sum_blocks<AccOf<E>>,
    norm_rows<E, AccOf<E>>,
    norm_rows_backward<E, AccOf<E>>,
    norm_sum_blocks<AccOf<E>>,
    dense_columns<E>,
};

const MixerKernels& mixer_kernels_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return kMixerKernels<double>;
    case DType::kBFloat16: return kMixerKernels<BFloat16>;
    case DType::kFloat16: return kMixerKernels<Float16>;
    default: return kMixerKernels<float>;
  }
}

}  // namespace
}  // namespace bitkernels::cpu
