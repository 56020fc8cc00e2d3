// A token's step of the causal convolution, for the kernels that make its input: a channel belongs to one thread, which
// reads the inputs of the tokens before and moves them on.
#pragma once

#include "ptx.cuh"
#include "step.cuh"
#include "types.cuh"

namespace bitkernels::cuda {

constexpr int kMostTaps = 4;  // that are held in registers

struct ConvColumn {
  int64_t at;  // of the channel's oldest input in the state; negative: no channel
  bool held;   // the request has a state
  float weight[kMostTaps], bias;
  uint32_t history[kMostTaps - 1];  // as they lie in memory: to convert one is to wait for it
};

__device__ inline uint32_t load_bits(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const uint32_t*>(p)[i];
  return static_cast<const uint16_t*>(p)[i];
}

__device__ inline void store_bits(void* p, DType dtype, int64_t i, uint32_t bits) {
  if (dtype == DType::kFloat32) {
    static_cast<uint32_t*>(p)[i] = bits;
  } else {
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits);
  }
}

// Brings what the channel of column n needs as far as L2.
__device__ inline void prefetch_conv(const ConvStep& p, int64_t request, int64_t n) {
  const int64_t channel = n - p.first;
  if (channel < 0 || channel >= p.channels) return;
  prefetch_to_l2(static_cast<const float*>(p.weight) + channel * p.W);
  if (p.bias) prefetch_to_l2(static_cast<const float*>(p.bias) + channel);
  const int64_t slot = slot_of(p.state_indices, p.slots, request);
  const int64_t bytes = p.state_dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t w = 0; slot >= 0 && w + 1 < p.W; ++w) {
    prefetch_to_l2(static_cast<const char*>(p.state) + (slot * p.state_batch + w * p.state_row + channel) * bytes);
  }
}

__device__ inline ConvColumn conv_column(const ConvStep& p, int64_t request, int64_t n) {
  ConvColumn c{};
  const int64_t channel = n - p.first;
  c.at = -1;
  if (channel < 0 || channel >= p.channels) return c;
  const int64_t slot = slot_of(p.state_indices, p.slots, request);
  c.held = slot >= 0;
  c.at = c.held ? slot * p.state_batch + channel : 0;
  c.bias = p.bias ? static_cast<const float*>(p.bias)[channel] : 0.0f;
#pragma unroll
  for (int w = 0; w < kMostTaps; ++w) {
    if (w < p.W) c.weight[w] = static_cast<const float*>(p.weight)[channel * p.W + w];
    if (w + 1 < p.W && c.held) c.history[w] = load_bits(p.state, p.state_dtype, c.at + w * p.state_row);
  }
  return c;
}

// The activated convolution at this token, whose input is v.
__device__ inline float step_convolution(const ConvStep& p, const ConvColumn& c, float v) {
  float sum = c.bias;
#pragma unroll
  for (int w = 0; w < kMostTaps; ++w) {
    if (w >= p.W) continue;
    const bool last = w + 1 == kMostTaps || w + 1 == p.W;
    sum = fmaf(last ? v : from_bits(p.state_dtype, c.history[w]), c.weight[w], sum);
    if (w == 0 || !c.held) continue;
    const int64_t to = c.at + (w - 1) * p.state_row;
    if (last) {
      store(p.state, p.state_dtype, to, v);
    } else {
      store_bits(p.state, p.state_dtype, to, c.history[w]);
    }
  }
  return silu(sum);
}

// Four taps of one channel for kCount requests. Code that runs once takes as long as it is, so weights are one vector,
// and types are chosen by selects.
template <int kCount>
struct ConvTokens {
  char* state[kCount];  // the channel's oldest input; null: the request has none
  bool channel;
  float4 weight;
  float bias;
  uint32_t history[kCount][kMostTaps - 1];

  // Of `count` requests from `first` on.
  __device__ void load(const ConvStep& p, int first, int count, int n) {
    const int at = n - static_cast<int>(p.first);
    channel = count > 0 && at >= 0 && at < p.channels;
    if (!channel) return;
    weight = static_cast<const float4*>(p.weight)[at];
    bias = p.bias ? static_cast<const float*>(p.bias)[at] : 0.0f;
    const bool wide = p.state_dtype == DType::kFloat32;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int64_t slot = j < count ? slot_of(p.state_indices, p.slots, first + j) : -1;
      state[j] = slot < 0 ? nullptr : static_cast<char*>(p.state) + ((slot * p.state_batch + at) << (wide + 1));
#pragma unroll
      for (int w = 0; w + 1 < kMostTaps; ++w) {
        history[j][w] = 0;
        const char* from = state[j] + (w * p.state_row << (wide + 1));
        if (state[j] && wide) history[j][w] = *reinterpret_cast<const uint32_t*>(from);
        if (state[j] && !wide) history[j][w] = *reinterpret_cast<const uint16_t*>(from);
      }
    }
  }

  // The activated convolution of request j at this token, whose input is v.
  __device__ float step(const ConvStep& p, int j, float v) const {
    const uint32_t (&h)[kMostTaps - 1] = history[j];
    float sum = fmaf(from_bits(p.state_dtype, h[0]), weight.x, bias);
    sum = fmaf(from_bits(p.state_dtype, h[1]), weight.y, sum);
    sum = fmaf(from_bits(p.state_dtype, h[2]), weight.z, sum);
    const bool wide = p.state_dtype == DType::kFloat32;
    const uint32_t next[kMostTaps - 1] = {h[1], h[2], to_bits(p.state_dtype, v)};
#pragma unroll
    for (int w = 0; w + 1 < kMostTaps; ++w) {
      char* to = state[j] + (w * p.state_row << (wide + 1));
      if (state[j] && wide) *reinterpret_cast<uint32_t*>(to) = next[w];
      if (state[j] && !wide) *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(next[w]);
    }
    return silu(fmaf(v, weight.w, sum));
  }
};

// What surrounds a packed projection in a step of the Mamba-2 block: an RMSNorm before it, and afterwards a step of the
// convolution for some columns (kIn), or a sum with the residual (kOut).
enum class BlockStep { kNone, kIn, kOut };

struct StepOperands {
  const float* norm;  // [K]
  float eps;
  float* residual;  // [tokens, columns]
  ConvStep conv;
  Ahead states;  // that the kernel after the input projection reads
};

}  // namespace bitkernels::cuda
