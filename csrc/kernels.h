// What a backend offers: functions of pointers, sizes and an executor. No torch here.
//
// The CPU and the CUDA library compile the same csrc/<op>.cpp against their own implementation of
// these declarations: BITKERNELS_BACKEND is `cpu` or `cuda`, set by the build.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#ifdef BITKERNELS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace bitkernels {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16, kInt8 };

// Which index of W~[n, k] = alpha * S[n, k] + beta the scales follow.
enum class ScaleAxis { kColumn, kRow, kSingle };

constexpr int64_t kSignsPerWord = 32;
constexpr int64_t kTernaryPerWord = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(begin, end) on disjoint ranges that cover [0, n), in parallel; a range holds at least
// `grain` items except the last.
using ParallelFor = std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f)>;

namespace BITKERNELS_BACKEND {

#ifdef BITKERNELS_CUDA
using Executor = cudaStream_t;
#else
using Executor = const ParallelFor&;
#endif

// Scales, bias and every reduction are `float`, or `double` where dtype is kFloat64 (CPU only).

void pack_sign(const void* w, DType dtype, uint32_t* w_packed, int64_t N, int64_t K, Executor);
void unpack_sign(const uint32_t* w_packed, void* w, DType dtype, int64_t N, int64_t K, Executor);
// Codes of w, or of w * (1 / scale[0]) in fp32 where a scale is given.
void pack_ternary(const void* w, const void* scale, DType dtype, uint32_t* w_packed, int64_t N, int64_t K, Executor);
void unpack_ternary(const uint32_t* w_packed, void* w, DType dtype, int64_t N, int64_t K, Executor);

// y[M, N] = x[M, K] @ (alpha * S + beta)[N, K]^T + bias[N]
struct PackedLinear {
  const void* x;             // [M, K] dtype
  const uint32_t* w_packed;  // [N, ceil(K / 32)]
  const void* alpha;         // [K], [N] or [1] by axis
  const void* beta;          // as alpha
  const void* bias;          // [N] or null
  void* y;                   // [M, N] dtype
  void* workspace;           // packed_linear_workspace() bytes, 256-byte aligned
  DType dtype;
  ScaleAxis axis;
  int64_t M, N, K;
};
int64_t packed_linear_workspace(const PackedLinear&);
void packed_linear(const PackedLinear&, Executor);
// Which kernel and tile the call takes here, and why where it is not the fastest: a line of text. Reads no memory.
std::string explain(const PackedLinear&);

// A step of the depthwise causal convolution, with SiLU, over columns [first, first + channels) of a projection.
struct ConvStep {
  void* state;         // [slots, W - 1, channels] state_dtype, strides below, innermost 1: inputs, oldest first
  const void* weight;  // [channels, W]
  const void* bias;    // [channels] or null
  const int64_t* state_indices;  // [M] the slot of each request, negative for none; null: its index
  DType state_dtype;
  int64_t state_batch, state_row, slots;
  int64_t first, channels, W;
};

struct SsdStep;  // mixer_kernels.h

// The first part of a decode step of the Mamba-2 block: linear of the normalised residual, then the convolution.
// Without that, of any number of tokens. Row m of the normalised x is x[m] / sqrt(mean(x[m]^2) + eps) * norm_weight.
struct Mamba2InStep {
  PackedLinear linear;      // x is fp32, fp64 where dtype is; y takes the convolution in place
  const void* norm_weight;  // [K]
  double eps;
  ConvStep conv;        // of no channels: none
  const SsdStep* next;  // the step that follows, or null: its states may be asked for early
};
int64_t mamba2_in_step_workspace(const Mamba2InStep&);
void mamba2_in_step(const Mamba2InStep&, Executor);

// The last part: linear of the normalised x, added to the residual.
struct Mamba2OutStep {
  PackedLinear linear;      // y is null
  const void* norm_weight;  // [K]
  double eps;
  void* residual;  // [M, N] fp32, fp64 where dtype is
};
int64_t mamba2_out_step_workspace(const Mamba2OutStep&);
void mamba2_out_step(const Mamba2OutStep&, Executor);

// H[M, K] = dy[M, N] @ S[N, K], D[m] = sum_n dy[m, n], for column scales:
//   dx = alpha * H + beta * D, dalpha[k] = sum_m x * H, dbeta[k] = sum_m x * D.
// Row and single scales belong to the summed index n, so they scale dy first:
//   dx = (alpha * dy) @ S + (dy @ beta); dalpha and dbeta are then not computed here.
struct PackedLinearBackward {
  const void* grad;          // [M, N] dtype
  const void* x;             // [M, K] dtype
  const uint32_t* w_packed;  // [N, ceil(K / 32)]
  const void* alpha;         // [K], [N] or [1] by axis
  const void* beta;          // as alpha
  void* dx;                  // [M, K] dtype
  void* dalpha;              // [K] for column scales, else null
  void* dbeta;               // as dalpha
  void* workspace;
  DType dtype;
  ScaleAxis axis;
  int64_t M, N, K;
};
int64_t packed_linear_backward_workspace(const PackedLinearBackward&);
void packed_linear_backward(const PackedLinearBackward&, Executor);

// What the product G[N, K] = dy^T x gives: dweight = alpha * G, and the sums of S * G (dalpha) and of G (dbeta), over n
// for column scales and over k for the others, where a single scale's sum over n is then left to the caller.
struct SignLinearWeightBackward {
  const void* product;       // [N, K] dtype
  const uint32_t* w_packed;  // [N, ceil(K / 32)]
  const void* alpha;         // [K], [N] or [1] by axis
  void* dweight;             // [N, K] weight_dtype or null
  void* dalpha;              // [K] for column scales, else [N], or null
  void* dbeta;               // as dalpha
  void* workspace;
  DType dtype, weight_dtype;
  ScaleAxis axis;
  int64_t N, K;
};
int64_t sign_linear_weight_backward_workspace(const SignLinearWeightBackward&);
void sign_linear_weight_backward(const SignLinearWeightBackward&, Executor);

// y[M, N] = x[M, K] @ weight[N, K]^T * scale[N], for few tokens and a large weight. On the CPU alone.
struct DenseLinear {
  const void* x;       // [M, K] dtype
  const void* weight;  // [N, K] weight_dtype, which is int8 or floating, and dtype where that is fp64
  const void* scale;   // [N] or null
  void* y;             // [M, N] dtype
  DType dtype, weight_dtype;
  int64_t M, N, K;
};
void dense_linear(const DenseLinear&, Executor);

// Per-token int8: scale = 127 / max(absmax, 1e-5), q = clip(round_half_even(x * scale), -128, 127), in fp32.
void quantize_int8(const void* x, DType dtype, int8_t* q, float* scale, int64_t M, int64_t K, Executor);
// y = q / scale, rounded to dtype.
void fake_quantize_int8(const void* x, void* y, DType dtype, int64_t M, int64_t K, Executor);

// y[M, N] = x[M, K] @ (scale * Q)[N, K]^T + bias[N]. With int8 activations the sum is an exact
// int32 and y = float(sum) * (scale / act_scale[m]) + bias, each step rounded once in fp32.
struct TernaryLinear {
  const void* x;             // [M, K] dtype
  const uint32_t* w_packed;  // [N, ceil(K / 16)]
  const void* scale;         // [1]
  const void* bias;          // [N] or null
  void* y;                   // [M, N] dtype
  void* workspace;
  DType dtype;
  bool int8_activations;
  int64_t M, N, K;
};
int64_t ternary_linear_workspace(const TernaryLinear&);
void ternary_linear(const TernaryLinear&, Executor);
std::string explain(const TernaryLinear&);

// dx[M, K] = scale * (dy[M, N] @ Q[N, K])
struct TernaryLinearBackward {
  const void* grad;          // [M, N] dtype
  const uint32_t* w_packed;  // [N, ceil(K / 16)]
  const void* scale;         // [1]
  void* dx;                  // [M, K] dtype
  void* workspace;
  DType dtype;
  int64_t M, N, K;
};
int64_t ternary_linear_backward_workspace(const TernaryLinearBackward&);
void ternary_linear_backward(const TernaryLinearBackward&, Executor);

}  // namespace BITKERNELS_BACKEND
}  // namespace bitkernels
