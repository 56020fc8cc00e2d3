#include "mixer_isa.h"

namespace bitkernels::cpu {

const MixerKernels& mixer_kernels(DType dtype) {
#if defined(__x86_64__)
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512) return mixer_kernels_avx512(dtype);
  if (avx2) return mixer_kernels_avx2(dtype);
#endif
  return mixer_kernels_portable(dtype);
}

}  // namespace bitkernels::cpu
