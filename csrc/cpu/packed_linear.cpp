// packed_linear and its backward on the lookup matmul.
#include "packed_linear.h"

#include <algorithm>

namespace bitkernels::cpu {
namespace {

template <typename T>
constexpr T kOne = 1;

// dx = grad @ (alpha * S + beta) is the same product with S transposed, so that scales of the summed
// index become scales of the result and the reverse.
template <typename T>
LookupMatmul<T> matmul(const void* x, const uint32_t* w, const void* alpha, const void* beta, const void* bias, void* y,
                       DType dtype, bool scales_follow_input, bool single, int64_t M, int64_t N, int64_t K) {
  const int64_t stride = single ? 0 : 1;
  const Scale<T> a{static_cast<const T*>(alpha), stride}, b{static_cast<const T*>(beta), stride}, one{&kOne<T>, 0};
  return {
      .x = x,
      .w = w,
      .y = y,
      .dtype = dtype,
      .format = Format::kSign,
      .in_scale = scales_follow_input ? a : one,
      .in_shift = scales_follow_input ? b : one,
      .out_scale = scales_follow_input ? one : a,
      .out_shift = scales_follow_input ? one : b,
      .bias = static_cast<const T*>(bias),
      .M = M,
      .N = N,
      .K = K,
      .left = nullptr,
      .left_dots = nullptr,
      .left_sums = nullptr,
  };
}

// Blocks of tokens whose contributions to dalpha and dbeta are summed on their own.
int64_t token_blocks(const PackedLinearBackward& a) {
  return ceil_div(a.M, lookup_block_tokens(Format::kSign, a.M, a.N));
}

int64_t transposed_words(const PackedLinearBackward& a) { return a.K * ceil_div(a.N, kSignsPerWord); }

template <typename T>
void sum_blocks(const T* partials, int64_t blocks, int64_t K, void* out, Executor run) {
  run(K, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += partials[b * K + k];
      static_cast<T*>(out)[k] = static_cast<T>(sum);
    }
  });
}

template <typename T>
void backward(const PackedLinearBackward& a, Executor run) {
  uint32_t* transposed = static_cast<uint32_t*>(a.workspace);
  transpose_packed(Format::kSign, a.w_packed, transposed, a.N, a.K, run);
  LookupMatmul<T> product = matmul<T>(a.grad, transposed, a.alpha, a.beta, nullptr, a.dx, a.dtype,
                                      a.axis == ScaleAxis::kRow, a.axis == ScaleAxis::kSingle, a.M, a.K, a.N);
  if (!a.dalpha) return lookup_matmul(product, run);
  const int64_t blocks = token_blocks(a);
  product.left = a.x;
  product.left_dots = reinterpret_cast<T*>(transposed + ceil_div(transposed_words(a), 2) * 2);
  product.left_sums = product.left_dots + blocks * a.K;
  lookup_matmul(product, run);
  sum_blocks(product.left_dots, blocks, a.K, a.dalpha, run);
  sum_blocks(product.left_sums, blocks, a.K, a.dbeta, run);
}

}  // namespace

template <typename T>
LookupMatmul<T> packed_product(const PackedLinear& a) {
  return matmul<T>(a.x, a.w_packed, a.alpha, a.beta, a.bias, a.y, a.dtype, a.axis == ScaleAxis::kColumn,
                   a.axis == ScaleAxis::kSingle, a.M, a.N, a.K);
}

template LookupMatmul<float> packed_product(const PackedLinear&);
template LookupMatmul<double> packed_product(const PackedLinear&);

int64_t packed_linear_workspace(const PackedLinear&) { return 0; }

void packed_linear(const PackedLinear& a, Executor run) {
  a.dtype == DType::kFloat64 ? lookup_matmul(packed_product<double>(a), run)
                             : lookup_matmul(packed_product<float>(a), run);
}

std::string explain(const PackedLinear& a) {
  return a.dtype == DType::kFloat64 ? explain_lookup(packed_product<double>(a))
                                    : explain_lookup(packed_product<float>(a));
}

int64_t packed_linear_backward_workspace(const PackedLinearBackward& a) {
  const int64_t element = a.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t partials = a.dalpha ? 2 * token_blocks(a) * a.K * element : 0;
  return ceil_div(transposed_words(a), 2) * 2 * sizeof(uint32_t) + partials;
}

void packed_linear_backward(const PackedLinearBackward& a, Executor run) {
  a.dtype == DType::kFloat64 ? backward<double>(a, run) : backward<float>(a, run);
}

}  // namespace bitkernels::cpu
