// From an accumulated sum to an element of the output.
#pragma once

#include "tokens.cuh"

namespace bitkernels::cuda {

struct Epilogue {
  const float* scale;  // of the output column, by stride; null: 1
  const float* shift;  // as scale
  int64_t stride;
  const float* bias;  // [columns] or null
  void* out;          // [M, columns] dtype
  DType dtype;
  int64_t columns;
};

struct Column {
  float scale, shift, bias;
};

__device__ inline Column column_of(const Epilogue& e, int64_t n) {
  return {e.scale ? e.scale[n * e.stride] : 1.0f, e.shift ? e.shift[n * e.stride] : 1.0f, e.bias ? e.bias[n] : 0.0f};
}

// Sum of weights in {-1, +1} or {-1, 0, +1} times activations.
__device__ inline float sign_sum(const Token& t, float accumulated) { return fmaf(accumulated, t.scale, -t.sum); }

__device__ inline float finish(const Epilogue&, const Token& t, const Column& c, float accumulated) {
  return fmaf(c.scale, sign_sum(t, accumulated), fmaf(c.shift, t.plain, c.bias));
}

// int8 activations: each step is rounded once.
__device__ inline float finish(const Epilogue& e, const Token& t, const Column& c, int accumulated) {
  const float y = __fmul_rn(__int2float_rn(accumulated - __float_as_int(t.sum)), __fdiv_rn(c.scale, t.scale));
  return e.bias ? __fadd_rn(y, c.bias) : y;
}

// An fp32 activation's two rows make one sum; every other token has one row.
__device__ inline float join_limbs(float high, float low) { return fmaf(low, kSecondLimb, high); }
__device__ inline int join_limbs(int only, int) { return only; }

// out[m, n] and out[m, n + 1]; `pair` says that the two are one aligned access away.
__device__ inline void store_pair(const Epilogue& e, int64_t m, int64_t n, bool pair, float v0, float v1) {
  const int64_t i = m * e.columns + n;
  if (!pair) {
    store(e.out, e.dtype, i, v0);
    if (n + 1 < e.columns) store(e.out, e.dtype, i + 1, v1);
    return;
  }
  switch (e.dtype) {
    case DType::kBFloat16:
      *reinterpret_cast<__nv_bfloat162*>(static_cast<bf16*>(e.out) + i) = __floats2bfloat162_rn(v0, v1);
      break;
    case DType::kFloat16: *reinterpret_cast<__half2*>(static_cast<fp16*>(e.out) + i) = __floats2half2_rn(v0, v1); break;
    default: *reinterpret_cast<float2*>(static_cast<float*>(e.out) + i) = make_float2(v0, v1);
  }
}

}  // namespace bitkernels::cuda
