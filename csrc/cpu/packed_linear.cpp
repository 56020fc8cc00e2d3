#include "kernels.h"
namespace bitkernels::cpu {
int64_t packed_linear_workspace(const PackedLinear&) { return 0; }
void packed_linear(const PackedLinear& a, Executor run) {
  run(a.M, 1, [&](int64_t b, int64_t e) { for (int64_t m = b; m < e; ++m) for (int64_t n = 0; n < a.N; ++n) {
    double s = 0; const float* x = (const float*)a.x + m * a.K;
    for (int64_t k = 0; k < a.K; ++k) { bool bit = a.w_packed[n * ceil_div(a.K, 32) + k / 32] >> (k % 32) & 1; 
      int64_t i = a.axis == ScaleAxis::kColumn ? k : a.axis == ScaleAxis::kRow ? n : 0;
      s += x[k] * (((const float*)a.alpha)[i] * (bit ? 1 : -1) + ((const float*)a.beta)[i]); }
    ((float*)a.y)[m * a.N + n] = s + (a.bias ? ((const float*)a.bias)[n] : 0); } });
}
}
