#include "mixer_isa.h"

namespace bitkernels::cpu {

void ssd_step(const SsdStep& p, Executor parallel_for) {
  const MixerKernels& kernels = mixer_kernels(p.dtype);
  // Below some thousand state elements a thread costs more than it saves.
  const int64_t grain = ceil_div(8192, p.P * p.N > 0 ? p.P * p.N : 1);
  parallel_for(p.batch * p.H, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.step_head(p, i / p.H, i % p.H);
  });
}

}  // namespace bitkernels::cpu
