// The steps on either side of the state, of the product, the convolution and a norm.
#include <type_traits>
#include <vector>

#include "../mixer_kernels.h"
#include "element.h"

namespace bitkernels::cpu {
namespace {

int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Parts of a workspace begin on cache lines.
int64_t lines(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

int64_t normalised_bytes(const PackedLinear& p) { return lines(p.M * p.K * element_size(p.dtype)); }

// Several sums at once, which a compiler makes vectors of.
template <typename T, typename X>
T mean_square(const X* x, int64_t K) {
  constexpr int kSums = 16;
  T sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= K; k += kSums) {
    for (int i = 0; i < kSums; ++i) {
      const T v = to_float(x[k + i]);
      sums[i] += v * v;
    }
  }
  for (; k < K; ++k) {
    const T v = to_float(x[k]);
    sums[0] += v * v;
  }
  T total = 0;
  for (T sum : sums) total += sum;
  return total / static_cast<T>(K);
}

template <typename X, typename E, typename T>
void normalise(const X* x, const T* weight, E* out, int64_t M, int64_t K, double eps, Executor run) {
  run(M, ceil_div(16384, K + 1), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const X* row = x + m * K;
      const T scale = T(1) / static_cast<T>(__builtin_sqrt(mean_square<T>(row, K) + static_cast<T>(eps)));
      for (int64_t k = 0; k < K; ++k) from_float(static_cast<T>(to_float(row[k])) * scale * weight[k], out[m * K + k]);
    }
  });
}

// Normalises x, of the residual's type or of the activations', into the workspace and multiplies from there into y.
void normalise_and_multiply(const PackedLinear& p, bool from_residual, const void* weight, double eps, void* y,
                            Executor run) {
  visit(p.dtype, [&](auto e) {
    using E = decltype(e);
    using T = std::conditional_t<std::is_same_v<E, double>, double, float>;
    const T* w = static_cast<const T*>(weight);
    E* out = static_cast<E*>(p.workspace);
    if (from_residual) {
      normalise(static_cast<const T*>(p.x), w, out, p.M, p.K, eps, run);
    } else {
      normalise(static_cast<const E*>(p.x), w, out, p.M, p.K, eps, run);
    }
  });
  PackedLinear product = p;
  product.x = p.workspace;
  product.y = y;
  product.workspace = static_cast<char*>(p.workspace) + normalised_bytes(p);
  packed_linear(product, run);
}

int64_t product_bytes(const PackedLinear& p) { return lines(packed_linear_workspace(p)); }

int64_t history_bytes(const Mamba2InStep& p) {
  return lines(p.linear.M * (p.conv.W - 1) * p.conv.channels * element_size(p.linear.dtype));
}

// y[.., first + channel] becomes its convolution: histories are gathered, convolved, and moved on.
template <typename E, typename S>
void convolve(const ConvStep& p, E* y, int64_t columns, DType dtype, int64_t M, char* workspace, int64_t history_bytes,
              Executor run) {
  const int64_t taps = p.W - 1, C = p.channels;
  E* history = reinterpret_cast<E*>(workspace);
  E* out = reinterpret_cast<E*>(workspace + history_bytes);
  const int64_t grain = ceil_div(16384, p.W * C + 1);
  const auto state_of = [&](int64_t m) {
    const int64_t slot = p.state_indices ? p.state_indices[m] : m;
    return slot < 0 ? nullptr : static_cast<S*>(p.state) + slot * p.state_batch;
  };
  run(M, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const S* state = state_of(m);
      for (int64_t w = 0; w < taps; ++w) {
        E* to = history + (m * taps + w) * C;
        for (int64_t c = 0; c < C; ++c) {
          to[c] = E{};
          if (state) from_float(to_float(state[w * p.state_row + c]), to[c]);
        }
      }
    }
  });
  std::vector<Sequence> tokens;
  for (int64_t m = 0; m < M; ++m) tokens.push_back({m, 0, 1, m});
  causal_conv1d(CausalConv1d{.x = {y + p.first, columns, 0, 0},
                             .weight = p.weight,
                             .bias = p.bias,
                             .initial = history,
                             .seq_idx = nullptr,
                             .y = out,
                             .sequences = tokens.data(),
                             .dtype = dtype,
                             .silu = true,
                             .S = M,
                             .T = 1,
                             .C = C,
                             .W = p.W},
                run);
  run(M, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      E* row = y + m * columns + p.first;
      if (S* state = state_of(m)) {
        for (int64_t w = 0; w + 1 < taps; ++w) {
          S* to = state + w * p.state_row;
          for (int64_t c = 0; c < C; ++c) to[c] = to[c + p.state_row];
        }
        for (int64_t c = 0; taps > 0 && c < C; ++c) {
          from_float(to_float(row[c]), state[(taps - 1) * p.state_row + c]);
        }
      }
      for (int64_t c = 0; c < C; ++c) row[c] = out[m * C + c];
    }
  });
}

}  // namespace

int64_t mamba2_in_step_workspace(const Mamba2InStep& p) {
  return normalised_bytes(p.linear) + product_bytes(p.linear) + history_bytes(p) +
         p.linear.M * p.conv.channels * element_size(p.linear.dtype);
}

void mamba2_in_step(const Mamba2InStep& p, Executor run) {
  const PackedLinear& linear = p.linear;
  normalise_and_multiply(linear, true, p.norm_weight, p.eps, linear.y, run);
  char* workspace = static_cast<char*>(linear.workspace) + normalised_bytes(linear) + product_bytes(linear);
  visit(linear.dtype, [&](auto e) {
    visit(p.conv.state_dtype, [&](auto s) {
      using E = decltype(e);
      convolve<E, decltype(s)>(p.conv, static_cast<E*>(linear.y), linear.N, linear.dtype, linear.M, workspace,
                               history_bytes(p), run);
    });
  });
}

int64_t mamba2_out_step_workspace(const Mamba2OutStep& p) {
  return normalised_bytes(p.linear) + product_bytes(p.linear) + p.linear.M * p.linear.N * element_size(p.linear.dtype);
}

void mamba2_out_step(const Mamba2OutStep& p, Executor run) {
  const PackedLinear& linear = p.linear;
  void* y = static_cast<char*>(linear.workspace) + normalised_bytes(linear) + product_bytes(linear);
  normalise_and_multiply(linear, false, p.norm_weight, p.eps, y, run);
  visit(linear.dtype, [&](auto e) {
    using E = decltype(e);
    using T = std::conditional_t<std::is_same_v<E, double>, double, float>;
    T* residual = static_cast<T*>(p.residual);
    run(linear.M * linear.N, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) residual[i] += to_float(static_cast<const E*>(y)[i]);
    });
  });
}

}  // namespace bitkernels::cpu
