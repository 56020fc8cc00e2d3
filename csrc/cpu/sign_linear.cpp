// sign_linear_weight_backward: one pass over the product G = dy^T x.
#include <algorithm>

#include "element.h"
#include "kernels.h"

namespace bitkernels::cpu {
namespace {

// A strip of columns whose sums stay in the first-level cache, and rows of which a thread takes some.
constexpr int64_t kStrip = 256;
constexpr int64_t kGrainRows = 16;

bool is_plus(const uint32_t* row, int64_t k) { return row[k / kSignsPerWord] >> k % kSignsPerWord & 1; }

template <typename In, typename Out>
void run(const SignLinearWeightBackward& p, Executor run_parallel) {
  using Wide = decltype(to_float(In{}));
  const In* product = static_cast<const In*>(p.product);
  const Wide* alpha = static_cast<const Wide*>(p.alpha);
  Out* dweight = static_cast<Out*>(p.dweight);
  Wide* dalpha = static_cast<Wide*>(p.dalpha);
  Wide* dbeta = static_cast<Wide*>(p.dbeta);
  const int64_t words = ceil_div(p.K, kSignsPerWord);
  if (p.axis != ScaleAxis::kColumn) {
    run_parallel(p.N, kGrainRows, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const In* row = product + n * p.K;
        const Wide scale = alpha[p.axis == ScaleAxis::kRow ? n : 0];
        double signed_sum = 0, plain_sum = 0;
        for (int64_t k = 0; k < p.K; ++k) {
          const Wide v = to_float(row[k]);
          signed_sum += is_plus(p.w_packed + n * words, k) ? v : -v;
          plain_sum += v;
          if (dweight) from_float(v * scale, dweight[n * p.K + k]);
        }
        if (!dalpha) continue;
        dalpha[n] = static_cast<Wide>(signed_sum);
        dbeta[n] = static_cast<Wide>(plain_sum);
      }
    });
    return;
  }
  run_parallel(ceil_div(p.K, kStrip), 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kStrip;
      const int64_t count = std::min(kStrip, p.K - first);
      double signed_sums[kStrip] = {}, plain_sums[kStrip] = {};
      for (int64_t n = 0; n < p.N; ++n) {
        const In* row = product + n * p.K + first;
        const uint32_t* signs = p.w_packed + n * words + first / kSignsPerWord;
        for (int64_t k = 0; k < count; ++k) {
          const Wide v = to_float(row[k]);
          signed_sums[k] += is_plus(signs, k) ? v : -v;
          plain_sums[k] += v;
          if (dweight) from_float(v * alpha[first + k], dweight[n * p.K + first + k]);
        }
      }
      if (!dalpha) continue;
      for (int64_t k = 0; k < count; ++k) {
        dalpha[first + k] = static_cast<Wide>(signed_sums[k]);
        dbeta[first + k] = static_cast<Wide>(plain_sums[k]);
      }
    }
  });
}

}  // namespace

int64_t sign_linear_weight_backward_workspace(const SignLinearWeightBackward&) { return 0; }

void sign_linear_weight_backward(const SignLinearWeightBackward& p, Executor run_parallel) {
  visit(p.dtype,
        [&](auto in) { visit(p.weight_dtype, [&](auto out) { run<decltype(in), decltype(out)>(p, run_parallel); }); });
}

}  // namespace bitkernels::cpu
