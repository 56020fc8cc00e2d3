#include "buffer.h"
#include "mixer_isa.h"

namespace bitkernels::cpu {

void dense_linear(const DenseLinear& p, Executor parallel_for) {
  const MixerKernels& kernels = mixer_kernels(p.dtype);
  // Every thread widens x for itself, so that it needs many columns to be worth it.
  const int64_t grain = ceil_div(1 << 18, p.M * p.K + 1);
  parallel_for(p.N, grain, [&](int64_t begin, int64_t end) {
    const Buffer<char> wide(p.M * p.K * acc_size(p.dtype));
    kernels.dense_columns(p, begin, end, wide.data);
  });
}

}  // namespace bitkernels::cpu
