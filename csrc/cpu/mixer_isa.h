// The Mamba-2 kernels, and the head's, of one instruction set and one dtype, and the choice between them.
#pragma once

#include "../mixer_kernels.h"

namespace bitkernels::cpu {

struct MixerKernels {
  void (*scan_group_tiles)(const SsdScan&, const Sequence&, int64_t chunk, int64_t group);
  void (*scan_heads)(const SsdScan&, int64_t begin, int64_t end, void* scratch);
  void (*scan_block_backward)(const SsdScanBackward&, int64_t sequence, int64_t group, int64_t block, void* scratch);
  void (*scan_sum_blocks)(const SsdScanBackward&, const Sequence&, int64_t chunk, int64_t group);
  void (*scan_sum_sequences)(const SsdScanBackward&, int64_t head);
  void (*step_head)(const SsdStep&, int64_t batch, int64_t head);
  void (*conv_rows)(const CausalConv1d&, const Sequence&, int64_t begin, int64_t end, void* scratch);
  void (*conv_rows_backward)(const CausalConv1dBackward&, const Sequence&, int64_t begin, int64_t end, void* partial,
                             void* scratch);
  void (*conv_sum_blocks)(const CausalConv1dBackward&, int64_t blocks, int64_t begin, int64_t end);
  void (*norm_rows)(const GatedRmsNorm&, int64_t begin, int64_t end, void* scratch);
  void (*norm_rows_backward)(const GatedRmsNormBackward&, int64_t begin, int64_t end, void* partial);
  void (*norm_sum_blocks)(const GatedRmsNormBackward&, int64_t blocks, int64_t begin, int64_t end);
  void (*dense_columns)(const DenseLinear&, int64_t begin, int64_t end, void* scratch);
};

const MixerKernels& mixer_kernels_portable(DType);
const MixerKernels& mixer_kernels_avx2(DType);
const MixerKernels& mixer_kernels_avx512(DType);

// For the machine this runs on.
const MixerKernels& mixer_kernels(DType);

inline int64_t acc_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

}  // namespace bitkernels::cpu
