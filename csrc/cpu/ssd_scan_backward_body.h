// The gradient of the chunked scan for one instruction set. With F the adjoint of the state that
// arrives from the chunks after this one (in terms of ssd_scan_body.h, K = M * (dy x'^T), x' = dt x):
//   dx'_s = sum_{t >= s} M[t][s] (C_t . B_s) dy_t + (a_end .. a_{s+1}) F B_s
//   dB_s  = sum_{t >= s} K[t][s] C_t + (a_end .. a_{s+1}) F^T x'_s
//   dC_t  = sum_{s <= t} K[t][s] B_s + (a_t .. a_0) S^T dy_t
// and the gradient of log a_u is the sum of what flows across the boundary before u.
#pragma once

#include "ssd_scan_body.h"

namespace bitkernels::cpu {
namespace {

template <typename E, typename T>
struct HeadScanBackward : HeadScan<E, T> {
  using Forward = HeadScan<E, T>;
  using Forward::BT, Forward::BwT, Forward::CaT, Forward::CB, Forward::CT, Forward::D, Forward::G, Forward::S;
  using Forward::chunks, Forward::decay, Forward::group, Forward::head, Forward::index, Forward::layout;
  using Forward::length, Forward::p, Forward::sequence, Forward::take, Forward::time, Forward::xd, Forward::y;

  const SsdScanBackward& g;
  T* F;  // the adjoint, where the forward has its state
  T *dy, *dyT, *xT, *dx, *K, *KT, *Q, *dC, *dD, *states;
  T *dB_sum, *dC_sum;  // [N, kChunk] a chunk: this block's share of dB^T and dC^T
  bool first_of_block = false;
  T dA = 0, dbias = 0;

  HeadScanBackward(const SsdScanBackward& g, int64_t index, int64_t head, T*& shared, T*& own)
      : Forward(g.forward, index, head, shared, own), g(g), F(S) {
    dy = take(shared, kChunk * layout.padded);
    dyT = take(shared, kChunk * layout.padded);
    xT = take(shared, kChunk * layout.padded);
    dx = take(shared, kChunk * layout.padded);
    K = take(shared, kChunk * kChunk);
    KT = take(shared, kChunk * kChunk);
    Q = take(shared, kChunk * kChunk);
    dC = take(shared, p.N * kChunk);
    dD = take(own, layout.padded);
    states = take(own, chunks() * p.N * layout.padded);
  }

  T* state(int64_t c) const { return states + c * p.N * layout.padded; }

  void begin() {
    for (int64_t i = 0; i < layout.padded; ++i) dD[i] = 0;
    if (chunks() > 0) this->load_state(p.initial_states, states);
    this->load_state(g.dfinal_states, F);
  }

  void forward(int64_t c) {
    this->enter(c);
    this->advance(state(c), state(c + 1));
  }

  void end() const {
    if (g.dinitial_states) this->store_state(F, g.dinitial_states);
    const int64_t pair = index * p.H + head;
    const BackwardLayout out(g);
    T* workspace = static_cast<T*>(p.workspace);
    workspace[out.dA + pair] = dA;
    workspace[out.ddt_bias + pair] = dbias;
    for (int64_t i = 0; i < p.P; ++i) workspace[out.dD + pair * p.P + i] = dD[i];
  }

  void backward(int64_t c) {
    this->enter(c);
    const int64_t width = layout.padded;
    const T* before = state(c);
    const int64_t tile = (sequence.first_chunk + c) * p.G + group;
    T* dBT = dB_sum + tile * p.N * kChunk;
    T* dCT = dC_sum + tile * p.N * kChunk;

    if (p.z.data) {
      this->output(before);
    } else {
      this->apply_decay(CB, G);
      this->scale_columns(CT, decay.from_start, CaT, p.N);
    }
    load_dy();
    this->scale_columns(BT, decay.to_end, BwT, p.N);
    transpose(xd, width, xT, width);
    transpose(dy, width, dyT, width);

    // K[t][s] = M[t][s] dy_t . x'_s; Q = K * (C B^T)
    multiply(Matrix<T>{dy, width, 1}, xT, kChunk, Q, kChunk, kChunk, kChunk, width, T(0));
    this->apply_decay(Q, K);
    transpose(K, kChunk, KT, kChunk);
    for (int64_t i = 0; i < kChunk * kChunk; i += kLanes<T>) store(Q + i, load(K + i) * load(CB + i));

    // What crosses each boundary: from before the chunk (in), beyond it (out), and all the way (through).
    T in[kChunk] = {}, out[kChunk] = {};
    this->scale_columns(dyT, decay.from_start, dyT, width);
    multiply(Matrix<T>{before, width, 1}, dyT, kChunk, dC, kChunk, p.N, kChunk, width, T(0));
    for (int64_t n = 0; n < p.N; ++n) {
      for (int64_t t = 0; t < kChunk; t += kLanes<T>) {
        store(in + t, load(in + t) + load(CT + n * kChunk + t) * load(dC + n * kChunk + t));
      }
    }
    multiply(Matrix<T>{BwT, 1, kChunk}, F, width, dx, width, kChunk, width, p.N, T(0));
    for (int64_t s = 0; s < kChunk; ++s) out[s] = dot(xd + s * width, dx + s * width, width);
    const T through = decay.total == 0 ? T(0) : decay.total * dot(before, F, p.N * width);

    multiply(Matrix<T>{G, 1, kChunk}, dy, width, dx, width, kChunk, width, kChunk, T(1), Shape::kUpper);

    this->scale_columns(xT, decay.to_end, xT, width);
    multiply(Matrix<T>{F, width, 1}, xT, kChunk, dBT, kChunk, p.N, kChunk, width, first_of_block ? T(0) : T(1));
    multiply(Matrix<T>{CT, kChunk, 1}, K, kChunk, dBT, kChunk, p.N, kChunk, kChunk, T(1));
    multiply(Matrix<T>{BT, kChunk, 1}, KT, kChunk, dC, kChunk, p.N, kChunk, kChunk, T(1));
    for (int64_t i = 0; i < p.N * kChunk; i += kLanes<T>) {
      store(dCT + i, first_of_block ? load(dC + i) : load(dCT + i) + load(dC + i));
    }
    multiply(Matrix<T>{CaT, kChunk, 1}, dy, width, F, width, p.N, width, kChunk, decay.total);

    T dlog_a[kChunk];
    sum_across_boundaries(in, out, through, dlog_a);
    store_token_gradients(dlog_a);
  }

  // dlog_a[u] = through + sum_{t >= u} in[t] + sum_{s < u} out[s] + sum_{t >= u, s < u} Q[t][s]
  void sum_across_boundaries(const T* in, const T* out, T through, T* dlog_a) const {
    T column[kChunk] = {};      // sum_{t >= u} Q[t][s]
    T before[2 * kChunk] = {};  // from kChunk - u on: 1 where s < u, else 0
    for (int64_t s = 0; s < kChunk; ++s) before[s] = 1;
    T later = 0;
    for (int64_t u = kChunk - 1; u >= 0; --u) {
      later += in[u];
      Vec<T> inner{};
      for (int64_t s = 0; s < kChunk; s += kLanes<T>) {
        const Vec<T> sum = load(column + s) + load(Q + u * kChunk + s);
        store(column + s, sum);
        inner += sum * load(before + kChunk - u + s);
      }
      dlog_a[u] = later + sum_lanes(inner);
    }
    T earlier = through;
    for (int64_t u = 0; u < kChunk; ++u) {
      // Nothing crosses where the state restarts, whatever rounding left.
      dlog_a[u] = decay.a[u] == 0 ? T(0) : dlog_a[u] + earlier;
      earlier += out[u];
    }
  }

  // dy of the scan proper (before the gate), its share of dD, and dz.
  void load_dy() {
    const int64_t width = layout.padded;
    for (int64_t t = 0; t < kChunk; ++t) {
      if (t >= length) {
        for (int64_t i = 0; i < width; i += kLanes<T>) store(dy + t * width + i, Vec<T>{});
        continue;
      }
      const E* x = row<E>(p.x, sequence.batch, time + t, head);
      const E* z = p.z.data ? row<E>(p.z, sequence.batch, time + t, head) : nullptr;
      const E* from = row<E>(g.dy, sequence.batch, time + t, head);
      E* dz = static_cast<E*>(g.dz) + offset(t);
      for (int64_t i = 0; i < width; i += kLanes<T>) {
        Vec<T> grad{};
        if (i < p.P) {
          grad = load(from + i, p.P - i);
          const Vec<T> value = load(x + i, p.P - i);
          if (z) {
            const Vec<T> gate = load(z + i, p.P - i), s = sigmoid(gate);
            const Vec<T> ungated = load(y + t * width + i) + load(D + i) * value;
            store(dz + i, grad * ungated * silu_slope(gate, s), p.P - i);
            grad *= gate * s;
          }
          store(dD + i, load(dD + i) + grad * value);
        }
        store(dy + t * width + i, grad);
      }
    }
  }

  int64_t offset(int64_t t) const { return ((sequence.batch * p.T + time + t) * p.H + head) * p.P; }

  void store_token_gradients(const T* dlog_a) {
    const int64_t width = layout.padded;
    const T A = *at<T>(p.A, head);
    T* ddt = static_cast<T*>(g.ddt);
    for (int64_t t = 0; t < length; ++t) {
      const E* x = row<E>(p.x, sequence.batch, time + t, head);
      E* to = static_cast<E*>(g.dx) + offset(t);
      Vec<T> sum{};
      for (int64_t i = 0; i < p.P; i += kLanes<T>) {
        const Vec<T> grad = load(dx + t * width + i);
        sum += grad * load(x + i, p.P - i);
        store(to + i, grad * decay.dt[t] + load(dy + t * width + i) * load(D + i), p.P - i);
      }
      const T draw = (sum_lanes(sum) + A * dlog_a[t]) * decay.slope[t];
      ddt[(sequence.batch * p.T + time + t) * p.H + head] = draw;
      dA += decay.dt[t] * dlog_a[t];
      dbias += draw;
    }
  }
};

// One block of the heads of a group, a few at a time.
template <typename E, typename T>
void scan_block_backward(const SsdScanBackward& g, int64_t index, int64_t group, int64_t block, void* memory) {
  const SsdScan& p = g.forward;
  const HeadBlocks blocks(p);
  const BackwardLayout out(g);
  const int64_t group_heads = p.H / p.G;
  const int64_t begin = block * blocks.heads;
  const int64_t end = begin + blocks.heads < group_heads ? begin + blocks.heads : group_heads;
  for (int64_t first = begin; first < end; first += kBunch) {
    const int64_t bunch = end - first < kBunch ? end - first : kBunch;
    T* own = static_cast<T*>(memory) + ScanLayout(p).shared_backward();
    auto scan = [&](int64_t i) {
      T* shared = static_cast<T*>(memory);
      return HeadScanBackward<E, T>(g, index, group * group_heads + first + (i < bunch ? i : 0), shared, own);
    };
    HeadScanBackward<E, T> heads[kBunch] = {scan(0), scan(1), scan(2), scan(3)};
    for (int64_t i = 0; i < bunch; ++i) {
      heads[i].dB_sum = static_cast<T*>(p.workspace) + out.dB + block * out.block;
      heads[i].dC_sum = static_cast<T*>(p.workspace) + out.dC + block * out.block;
      heads[i].first_of_block = first + i == begin;
      heads[i].begin();
    }
    const int64_t chunks = heads[0].chunks();
    for (int64_t c = 0; c + 1 < chunks; ++c) {
      for (int64_t i = 0; i < bunch; ++i) heads[i].forward(c);
    }
    for (int64_t c = chunks - 1; c >= 0; --c) {
      for (int64_t i = 0; i < bunch; ++i) heads[i].backward(c);
    }
    for (int64_t i = 0; i < bunch; ++i) heads[i].end();
  }
}

// dB and dC of one chunk and group: the sum over the blocks of heads, turned back to [T, N].
template <typename E, typename T>
void scan_sum_blocks(const SsdScanBackward& g, const Sequence& sequence, int64_t chunk, int64_t group) {
  const SsdScan& p = g.forward;
  const HeadBlocks blocks(p);
  const BackwardLayout layout(g);
  const int64_t begin = chunk * kChunk;
  const int64_t length = sequence.length - begin < kChunk ? sequence.length - begin : kChunk;
  for (int which = 0; which < 2; ++which) {
    T* tile = static_cast<T*>(p.workspace) + (which == 0 ? layout.dB : layout.dC) +
              ((sequence.first_chunk + chunk) * p.G + group) * p.N * kChunk;
    for (int64_t j = 1; j < blocks.count; ++j) {
      for (int64_t i = 0; i < p.N * kChunk; i += kLanes<T>) {
        store(tile + i, load(tile + i) + load(tile + j * layout.block + i));
      }
    }
    E* to = static_cast<E*>(which == 0 ? g.dB : g.dC);
    for (int64_t t = 0; t < length; ++t) {
      E* out = to + ((sequence.batch * p.T + sequence.begin + begin + t) * p.G + group) * p.N;
      for (int64_t n = 0; n < p.N; n += kLanes<T>) {
        Vec<T> value{};
        const int64_t count = p.N - n < kLanes<T> ? p.N - n : kLanes<T>;
        for (int64_t i = 0; i < count; ++i) value[i] = tile[(n + i) * kChunk + t];
        store(out + n, value, count);
      }
    }
  }
}

// dA, ddt_bias and dD of one head: the sums over the sequences.
template <typename T>
void scan_sum_sequences(const SsdScanBackward& g, int64_t head) {
  const SsdScan& p = g.forward;
  const BackwardLayout layout(g);
  const T* workspace = static_cast<const T*>(p.workspace);
  T dA = 0, dbias = 0, dD = 0;
  for (int64_t s = 0; s < p.S; ++s) {
    dA += workspace[layout.dA + s * p.H + head];
    dbias += workspace[layout.ddt_bias + s * p.H + head];
  }
  static_cast<T*>(g.dA)[head] = dA;
  if (g.ddt_bias) static_cast<T*>(g.ddt_bias)[head] = dbias;
  if (!p.D) return;
  for (int64_t i = 0; i < p.P; ++i) {
    T channel = 0;
    for (int64_t s = 0; s < p.S; ++s) channel += workspace[layout.dD + (s * p.H + head) * p.P + i];
    if (p.D_per_channel) static_cast<T*>(g.dD)[head * p.P + i] = channel;
    dD += channel;
  }
  if (!p.D_per_channel) static_cast<T*>(g.dD)[head] = dD;
}

}  // namespace
}  // namespace bitkernels::cpu
