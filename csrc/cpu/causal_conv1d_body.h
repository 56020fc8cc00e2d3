// The depthwise causal convolution for one instruction set, in tiles of time by channels whose
// inputs are widened once. Tokens are counted from the start of their sequence; row r of the inputs is
// the token `begin - (W - 1) + r`.
#pragma once

#include "causal_conv1d_layout.h"
#include "mixer_vector.h"

namespace bitkernels::cpu {
namespace {

template <typename E, typename T>
struct ConvTile {
  const CausalConv1d& p;
  const Sequence& s;
  const int64_t begin, end, channel, channels;  // of this tile
  T *inputs, *weight, *bias;                    // [rows, kConvChannels], [W, kConvChannels], [kConvChannels]

  // Inputs reach to `last`, which may lie past the end of the tile.
  ConvTile(const CausalConv1d& p, const Sequence& s, int64_t begin, int64_t end, int64_t last, int64_t channel,
           T*& scratch)
      : p(p),
        s(s),
        begin(begin),
        end(end),
        channel(channel),
        channels(p.C - channel < kConvChannels ? p.C - channel : kConvChannels) {
    const int64_t history = p.W - 1;
    inputs = scratch;
    weight = inputs + (kConvTime + 2 * history) * kConvChannels;
    bias = weight + p.W * kConvChannels;
    scratch = bias + kConvChannels;
    for (int64_t t = begin - history; t < last; ++t) {
      const E* from = input(t);
      T* to = inputs + (t - begin + history) * kConvChannels;
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        store(to + c, from ? load(from + c, channels - c) : Vec<T>{});
      }
    }
    for (int64_t c = 0; c < kConvChannels; ++c) {
      const bool inside = c < channels;
      for (int64_t w = 0; w < p.W; ++w) {
        weight[w * kConvChannels + c] = inside ? static_cast<const T*>(p.weight)[(channel + c) * p.W + w] : T(0);
      }
      bias[c] = inside && p.bias ? static_cast<const T*>(p.bias)[channel + c] : T(0);
    }
  }

  // Null where the input is zero.
  const E* input(int64_t t) const {
    if (t >= 0) return static_cast<const E*>(p.x.data) + s.batch * p.x.batch + (s.begin + t) * p.x.time + channel;
    if (!p.initial) return nullptr;
    return static_cast<const E*>(p.initial) + ((&s - p.sequences + 1) * (p.W - 1) + t) * p.C + channel;
  }

  // Whether token t sees the input `back` tokens before it; history before t = 0 belongs to the sequence at t = 0.
  bool sees(int64_t t, int64_t back) const {
    if (!p.seq_idx) return true;
    const int64_t* ids = p.seq_idx + s.batch * p.T + s.begin;
    return ids[t] == ids[t >= back ? t - back : 0];
  }

  const T* tap(int64_t t, int64_t w) const { return inputs + (t - begin + w) * kConvChannels; }

  // The convolution with its bias, before the activation.
  void row(int64_t t, T* out) const {
    for (int64_t c = 0; c < channels; c += kLanes<T>) store(out + c, load(bias + c));
    for (int64_t w = 0; w < p.W; ++w) {
      if (!sees(t, p.W - 1 - w)) continue;
      const T* in = tap(t, w);
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        store(out + c, load(out + c) + load(in + c) * load(weight + w * kConvChannels + c));
      }
    }
  }
};

template <typename E, typename T>
void conv_rows(const CausalConv1d& p, const Sequence& s, int64_t begin, int64_t end, void* memory) {
  T out[kConvChannels];
  for (int64_t channel = 0; channel < p.C; channel += kConvChannels) {
    T* scratch = static_cast<T*>(memory);
    const ConvTile<E, T> tile(p, s, begin, end, end, channel, scratch);
    for (int64_t t = begin; t < end; ++t) {
      tile.row(t, out);
      E* to = static_cast<E*>(p.y) + (s.batch * p.T + s.begin + t) * p.C + channel;
      for (int64_t c = 0; c < tile.channels; c += kLanes<T>) {
        store(to + c, p.silu ? silu(load(out + c)) : load(out + c), tile.channels - c);
      }
    }
  }
}

// dx of the tokens [begin, end) and their share of dweight and dbias: [W + 1, C] of acc at `partial`.
template <typename E, typename T>
void conv_rows_backward(const CausalConv1dBackward& g, const Sequence& s, int64_t begin, int64_t end, void* partial,
                        void* memory) {
  const CausalConv1d& p = g.forward;
  const int64_t history = p.W - 1;
  const int64_t last = end + history < s.length ? end + history : s.length;  // outputs that see this tile's inputs
  for (int64_t channel = 0; channel < p.C; channel += kConvChannels) {
    T* scratch = static_cast<T*>(memory);
    const ConvTile<E, T> tile(p, s, begin, end, last, channel, scratch);
    const int64_t channels = tile.channels;
    T* grads = scratch;                                       // [last - begin, kConvChannels]
    T* sums = grads + (kConvTime + history) * kConvChannels;  // [W + 1, kConvChannels]
    for (int64_t i = 0; i < (p.W + 1) * kConvChannels; ++i) sums[i] = 0;

    for (int64_t t = begin; t < last; ++t) {
      T* grad = grads + (t - begin) * kConvChannels;
      const E* dy = static_cast<const E*>(g.dy.data) + s.batch * g.dy.batch + (s.begin + t) * g.dy.time + channel;
      if (p.silu) tile.row(t, grad);
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        Vec<T> value = load(dy + c, channels - c);
        if (p.silu) {
          const Vec<T> before = load(grad + c);
          value *= silu_slope(before, sigmoid(before));
        }
        store(grad + c, value);
      }
      if (t >= end) continue;
      for (int64_t w = 0; w <= p.W; ++w) {
        if (w < p.W && !tile.sees(t, history - w)) continue;
        T* sum = sums + w * kConvChannels;
        for (int64_t c = 0; c < channels; c += kLanes<T>) {
          const Vec<T> value = load(grad + c);
          store(sum + c, load(sum + c) + (w < p.W ? value * load(tile.tap(t, w) + c) : value));
        }
      }
    }

    // Inputs before t = 0 belong to the first chunk.
    for (int64_t t = begin == 0 && g.dinitial ? -history : begin; t < end; ++t) {
      E* to = t >= 0 ? static_cast<E*>(g.dx) + (s.batch * p.T + s.begin + t) * p.C + channel
                     : static_cast<E*>(g.dinitial) + ((&s - p.sequences + 1) * history + t) * p.C + channel;
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        Vec<T> sum{};
        for (int64_t back = 0; back <= history; ++back) {
          const int64_t user = t + back;
          if (user < begin || user >= last || !tile.sees(user, back)) continue;
          sum += load(grads + (user - begin) * kConvChannels + c) *
                 load(tile.weight + (history - back) * kConvChannels + c);
        }
        store(to + c, sum, channels - c);
      }
    }
    for (int64_t w = 0; w <= p.W; ++w) {
      T* to = static_cast<T*>(partial) + w * p.C + channel;
      for (int64_t c = 0; c < channels; ++c) to[c] = sums[w * kConvChannels + c];
    }
  }
}

template <typename T>
void conv_sum_blocks(const CausalConv1dBackward& g, int64_t blocks, int64_t begin, int64_t end) {
  const CausalConv1d& p = g.forward;
  const T* partial = static_cast<const T*>(g.workspace);
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t w = 0; w <= p.W; ++w) {
      if (w == p.W && !g.dbias) continue;
      T sum = 0;
      for (int64_t j = 0; j < blocks; ++j) sum += partial[(j * (p.W + 1) + w) * p.C + c];
      if (w < p.W) {
        static_cast<T*>(g.dweight)[c * p.W + w] = sum;
      } else {
        static_cast<T*>(g.dbias)[c] = sum;
      }
    }
  }
}

}  // namespace
}  // namespace bitkernels::cpu
