#include "mixer_isa.h"

#include "cpu_features.h"

namespace bitkernels::cpu {

const MixerKernels& mixer_kernels(DType dtype) {
  switch (path()) {
#if defined(__x86_64__)
    case Path::kAvx512: return mixer_kernels_avx512(dtype);
    case Path::kAvx2: return mixer_kernels_avx2(dtype);
#endif
    default: return mixer_kernels_portable(dtype);
  }
}

}  // namespace bitkernels::cpu
