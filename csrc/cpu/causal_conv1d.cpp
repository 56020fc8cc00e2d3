// How the convolution is shared among threads: by rows of a fixed number of tokens, so that the order
// of the sums for dweight does not depend on the threads.
#include "buffer.h"
#include "causal_conv1d_layout.h"
#include "mixer_isa.h"

namespace bitkernels::cpu {
namespace {

// Calls f(block, batch, begin, end, scratch) in parallel for every block of tokens.
template <typename F>
void for_each_block(const CausalConv1d& p, Executor parallel_for, const F& f) {
  const int64_t row_blocks = ceil_div(p.T, kConvTime);
  const int64_t grain = ceil_div(16384, kConvTime * p.C + 1);
  parallel_for(p.batch * row_blocks, grain, [&](int64_t first, int64_t last) {
    const Buffer<char> scratch(conv_scratch(p.W) * acc_size(p.dtype));
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % row_blocks * kConvTime;
      f(i, i / row_blocks, begin, begin + kConvTime < p.T ? begin + kConvTime : p.T, scratch.data);
    }
  });
}

int64_t partial_bytes(const CausalConv1d& p) { return (p.W + 1) * p.C * acc_size(p.dtype); }

}  // namespace

void causal_conv1d(const CausalConv1d& p, Executor parallel_for) {
  const MixerKernels& kernels = mixer_kernels(p.dtype);
  for_each_block(p, parallel_for, [&](int64_t, int64_t batch, int64_t begin, int64_t end, void* scratch) {
    kernels.conv_rows(p, batch, begin, end, scratch);
  });
}

int64_t causal_conv1d_backward_workspace(const CausalConv1dBackward& g) {
  return g.forward.batch * ceil_div(g.forward.T, kConvTime) * partial_bytes(g.forward);
}

void causal_conv1d_backward(const CausalConv1dBackward& g, Executor parallel_for) {
  const CausalConv1d& p = g.forward;
  const MixerKernels& kernels = mixer_kernels(p.dtype);
  for_each_block(p, parallel_for, [&](int64_t block, int64_t batch, int64_t begin, int64_t end, void* scratch) {
    char* partial = static_cast<char*>(g.workspace) + block * partial_bytes(p);
    kernels.conv_rows_backward(g, batch, begin, end, partial, scratch);
  });
  parallel_for(p.C, 64, [&](int64_t begin, int64_t end) {
    kernels.conv_sum_blocks(g, p.batch * ceil_div(p.T, kConvTime), begin, end);
  });
}

}  // namespace bitkernels::cpu
