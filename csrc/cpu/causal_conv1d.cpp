// How the convolution is shared among threads: by chunks of a fixed number of tokens, so that the order
// of the sums for dweight does not depend on the threads.
#include "buffer.h"
#include "causal_conv1d_layout.h"
#include "mixer_isa.h"

namespace bitkernels::cpu {
namespace {

int64_t count_chunks(const CausalConv1d& p) {
  if (p.S == 0) return 0;
  const Sequence& last = p.sequences[p.S - 1];
  return last.first_chunk + causal_conv1d_chunks(last.length);
}

// Calls f(chunk, sequence, begin, end, scratch) in parallel for every chunk of tokens.
template <typename F>
void for_each_chunk(const CausalConv1d& p, Executor parallel_for, const F& f) {
  const int64_t grain = ceil_div(16384, kConvTime * p.C + 1);
  parallel_for(count_chunks(p), grain, [&](int64_t first, int64_t last) {
    const Buffer<char> scratch(conv_scratch(p.W) * acc_size(p.dtype));
    const Sequence* s = p.sequences;
    for (int64_t i = first; i < last; ++i) {
      while (i >= s->first_chunk + causal_conv1d_chunks(s->length)) ++s;
      const int64_t begin = (i - s->first_chunk) * kConvTime;
      f(i, *s, begin, begin + kConvTime < s->length ? begin + kConvTime : s->length, scratch.data);
    }
  });
}

int64_t partial_bytes(const CausalConv1d& p) { return (p.W + 1) * p.C * acc_size(p.dtype); }

}  // namespace

int64_t causal_conv1d_chunks(int64_t length) { return ceil_div(length, kConvTime); }

void causal_conv1d(const CausalConv1d& p, Executor parallel_for) {
  const MixerKernels& kernels = mixer_kernels(p.dtype);
  for_each_chunk(p, parallel_for, [&](int64_t, const Sequence& s, int64_t begin, int64_t end, void* scratch) {
    kernels.conv_rows(p, s, begin, end, scratch);
  });
}

int64_t causal_conv1d_backward_workspace(const CausalConv1dBackward& g) {
  return count_chunks(g.forward) * partial_bytes(g.forward);
}

void causal_conv1d_backward(const CausalConv1dBackward& g, Executor parallel_for) {
  const CausalConv1d& p = g.forward;
  const MixerKernels& kernels = mixer_kernels(p.dtype);
  for_each_chunk(p, parallel_for, [&](int64_t chunk, const Sequence& s, int64_t begin, int64_t end, void* scratch) {
    char* partial = static_cast<char*>(g.workspace) + chunk * partial_bytes(p);
    kernels.conv_rows_backward(g, s, begin, end, partial, scratch);
  });
  parallel_for(p.C, 64, [&](int64_t begin, int64_t end) { kernels.conv_sum_blocks(g, count_chunks(p), begin, end); });
}

}  // namespace bitkernels::cpu
