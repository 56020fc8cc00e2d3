// How the gated norm is shared among threads.
#include "buffer.h"
#include "mixer_isa.h"

namespace bitkernels::cpu {
namespace {

int64_t grain(const GatedRmsNorm& p) { return ceil_div(16384, p.width + 1); }

// Rows that sum into one partial dweight: a number that follows from the shape alone, so that the
// result does not depend on the threads.
int64_t block_rows(const GatedRmsNorm& p) {
  const int64_t rows = ceil_div(p.M, 64);
  return rows < 16 ? 16 : rows;
}

}  // namespace

void gated_rms_norm(const GatedRmsNorm& p, Executor parallel_for) {
  const MixerKernels& kernels = mixer_kernels(p.dtype);
  parallel_for(p.M, grain(p), [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(ceil_div(p.group_size, 16) * 16 * acc_size(p.dtype));
    kernels.norm_rows(p, begin, end, scratch.data);
  });
}

int64_t gated_rms_norm_backward_workspace(const GatedRmsNormBackward& g) {
  return ceil_div(g.forward.M, block_rows(g.forward)) * g.forward.width * acc_size(g.forward.dtype);
}

void gated_rms_norm_backward(const GatedRmsNormBackward& g, Executor parallel_for) {
  const GatedRmsNorm& p = g.forward;
  const MixerKernels& kernels = mixer_kernels(p.dtype);
  const int64_t rows = block_rows(p), blocks = ceil_div(p.M, rows);
  parallel_for(blocks, ceil_div(grain(p), rows), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      char* partial = static_cast<char*>(g.workspace) + j * p.width * acc_size(p.dtype);
      kernels.norm_rows_backward(g, j * rows, (j + 1) * rows < p.M ? (j + 1) * rows : p.M, partial);
    }
  });
  parallel_for(p.width, 256, [&](int64_t begin, int64_t end) { kernels.norm_sum_blocks(g, blocks, begin, end); });
}

}  // namespace bitkernels::cpu
