// ternary_linear with int8 activations: exact sums, then every floating-point step rounded once.
#include "ternary_int8.h"

#include <algorithm>

#include "buffer.h"
#include "element.h"
#include "int8_dot.h"
#include "quantize_int8.h"

namespace bitkernels::cpu {
namespace {

// Tokens that meet a chunk of weights once it is loaded; their activations stay in a core's own cache.
constexpr int64_t kMaxBlockTokens = 64;
constexpr int64_t kGrainProducts = 1 << 18;  // products worth a thread

// What one thread needs: a block of quantised tokens, and a chunk of a panel with its dot products.
class Worker {
 public:
  explicit Worker(const TernaryLinear& a)
      : a_(a),
        kernels_(int8_kernels()),
        words_(ceil_div(a.K, kTernaryPerWord)),
        stride_(words_ * kTernaryPerWord),
        panels_(ceil_div(a.N, kPanelRows)),
        row_(stride_),
        q_(std::min(kMaxBlockTokens, a.M) * stride_),
        chunk_(kMaxChunkWords),
        dots_(std::min(kMaxBlockTokens, a.M) * kPanelRows) {}

  void operator()(int64_t begin, int64_t end) {
    int64_t quantized = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / panels_;
      if (block != quantized) quantize(block);
      quantized = block;
      multiply(block * kMaxBlockTokens, task % panels_ * kPanelRows);
    }
  }

 private:
  void quantize(int64_t block) {
    const int64_t m0 = block * kMaxBlockTokens;
    tokens_ = std::min(kMaxBlockTokens, a_.M - m0);
    std::fill(row_.data + a_.K, row_.data + stride_, int8_t{0});
    for (int64_t t = 0; t < tokens_; ++t) {
      scales_[t] = scalar(a_.scale, 0) / quantize_int8_row(a_.x, a_.dtype, m0 + t, row_.data, a_.K);
      sums_[t] = 0;
      for (int64_t k = 0; k < a_.K; ++k) sums_[t] += row_.data[k];
      int8_t* q = q_.data + t * stride_;
      for (int64_t i = 0; i < stride_; i += kTernaryPerWord) {
        for (int j = 0; j < kPlanes; ++j) {
          for (int b = 0; b < 4; ++b) q[i + 4 * j + b] = row_.data[i + 4 * b + j];
        }
      }
    }
  }

  void multiply(int64_t m0, int64_t n0) {
    std::fill_n(dots_.data, tokens_ * kPanelRows, 0);
    for_each_chunk(a_.w_packed, a_.N, words_, n0, [&](const uint32_t* const* rows, int64_t word, int count) {
      kernels_.load(rows, word, count, chunk_.data);
      kernels_.accumulate(chunk_.data, count, q_.data + word * kTernaryPerWord, stride_, tokens_, dots_.data);
    });
    const int64_t columns = std::min<int64_t>(kPanelRows, a_.N - n0);
    float bias[kPanelRows] = {};
    for (int64_t i = 0; a_.bias && i < columns; ++i) bias[i] = scalar(a_.bias, n0 + i);
    visit(a_.dtype, [&](auto element) {
      for (int64_t t = 0; t < tokens_; ++t) {
        decltype(element)* y = static_cast<decltype(element)*>(a_.y) + (m0 + t) * a_.N + n0;
        const int32_t* dots = dots_.data + t * kPanelRows;
        for (int64_t i = 0; i < columns; ++i) {
          from_float(static_cast<float>(dots[i] - sums_[t]) * scales_[t] + bias[i], y[i]);
        }
      }
    });
  }

  // Scale and bias are double where the activations are; this path computes in float.
  float scalar(const void* values, int64_t i) const {
    return a_.dtype == DType::kFloat64 ? static_cast<float>(static_cast<const double*>(values)[i])
                                       : static_cast<const float*>(values)[i];
  }

  const TernaryLinear& a_;
  const Int8Kernels& kernels_;
  const int64_t words_, stride_, panels_;
  Buffer<int8_t> row_, q_;
  Buffer<uint32_t> chunk_;
  Buffer<int32_t> dots_;
  int64_t tokens_ = 0;
  int32_t sums_[kMaxBlockTokens];
  float scales_[kMaxBlockTokens];  // of the results
};

}  // namespace

void ternary_linear_int8(const TernaryLinear& a, Executor run) {
  if (a.M == 0 || a.N == 0) return;
  const int64_t products = std::min(kMaxBlockTokens, a.M) * kPanelRows * std::max<int64_t>(a.K, 1);
  run(ceil_div(a.M, kMaxBlockTokens) * ceil_div(a.N, kPanelRows), ceil_div(kGrainProducts, products),
      [&](int64_t begin, int64_t end) { Worker{a}(begin, end); });
}

std::string explain_ternary_int8(const TernaryLinear& a) {
  return std::string("int8 dot products (") + int8_kernels().name + "): blocks of " +
         std::to_string(std::min(kMaxBlockTokens, a.M)) + " tokens times " + std::to_string(kPanelRows) +
         " rows of the weights";
}

}  // namespace bitkernels::cpu
