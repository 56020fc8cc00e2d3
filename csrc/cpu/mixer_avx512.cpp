#include "mixer_body.h"

namespace bitkernels::cpu {

const MixerKernels& mixer_kernels_avx512(DType dtype) { return mixer_kernels_of(dtype); }

}  // namespace bitkernels::cpu
