// The chunked scan for one instruction set. Within a chunk of kChunk tokens, with a_t = exp(dt_t A),
// M[t][s] = a_t a_{t-1} .. a_{s+1} and S the state before the chunk:
//   y_t = sum_{s <= t} M[t][s] (C_t . B_s) dt_s x_s + (a_t .. a_0) C_t S,
// so that most of the work is products of small matrices. The decays are products of numbers at or
// below 1, never an exp of a difference: nothing overflows, nothing cancels, and a_t = 0 restarts
// the state where a new sequence begins, for the gradients too.
#pragma once

#include "mixer_vector.h"
#include "ssd_scan_layout.h"

namespace bitkernels::cpu {
namespace {

// What depends on dt alone. Rows past the end of the sequence have dt = 0 and a = 1.
template <typename T>
struct ChunkDecay {
  T dt[kChunk], slope[kChunk];  // slope: d dt / d raw dt
  T a[kChunk];
  T from_start[kChunk];  // a_t .. a_0
  T to_end[kChunk];      // a_end .. a_{t+1}
  T total;               // of the whole chunk
};

template <typename T>
const T* at(const void* data, int64_t offset) {
  return static_cast<const T*>(data) + offset;
}

template <typename E>
const E* row(const Strided& view, int64_t batch, int64_t time, int64_t head) {
  return at<E>(view.data, batch * view.batch + time * view.time + head * view.head);
}

// out[rows, padded] = scale[row] * from, zero beyond `length` rows and `width` columns.
template <typename E, typename T>
void load_rows(const E* from, int64_t stride, const T* scale, T* out, int64_t length, int64_t rows, int64_t width,
               int64_t padded) {
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = 0; i < padded; i += kLanes<T>) {
      const Vec<T> value = t < length && i < width ? load(from + t * stride + i, width - i) : Vec<T>{};
      store(out + t * padded + i, scale ? value * scale[t] : value);
    }
  }
}

// out[cols][kChunk] = in[kChunk][cols]^T
template <typename T>
void transpose(const T* in, int64_t in_row, T* out, int64_t cols) {
  constexpr int kTile = 8;
  for (int64_t c = 0; c < cols; c += kTile) {
    for (int64_t t = 0; t < kChunk; t += kTile) {
      for (int i = 0; i < kTile; ++i) {
        for (int j = 0; j < kTile; ++j) out[(c + i) * kChunk + t + j] = in[(t + j) * in_row + c + i];
      }
    }
  }
}

template <typename T>
T dot(const T* a, const T* b, int64_t padded) {
  Vec<T> sum{};
  for (int64_t i = 0; i < padded; i += kLanes<T>) sum += load(a + i) * load(b + i);
  return sum_lanes(sum);
}

// B^T and C^T [N, kChunk] and C B^T [kChunk, kChunk], lower triangular, of one chunk and group: shared by its heads.
template <typename E, typename T>
void scan_group_tiles(const SsdScan& p, const Sequence& sequence, int64_t chunk, int64_t group) {
  const ScanLayout layout(p);
  T* tiles = static_cast<T*>(p.workspace) + layout.tiles(sequence.first_chunk + chunk, group);
  T* cb = tiles + 2 * p.N * kChunk;
  const int64_t begin = chunk * kChunk;
  const int64_t length = sequence.length - begin < kChunk ? sequence.length - begin : kChunk;
  for (int which = 0; which < 2; ++which) {
    const Strided& view = which == 0 ? p.B : p.C;
    T* tile = tiles + which * p.N * kChunk;
    for (int64_t t = 0; t < kChunk; ++t) {
      const E* from = row<E>(view, sequence.batch, sequence.begin + begin + (t < length ? t : 0), group);
      for (int64_t n = 0; n < p.N; n += kLanes<T>) {
        const Vec<T> value = t < length ? load(from + n, p.N - n) : Vec<T>{};
        const int64_t count = p.N - n < kLanes<T> ? p.N - n : kLanes<T>;
        for (int64_t i = 0; i < count; ++i) tile[(n + i) * kChunk + t] = value[i];
      }
    }
  }
  multiply(Matrix<T>{tiles + p.N * kChunk, 1, kChunk}, tiles, kChunk, cb, kChunk, kChunk, kChunk, p.N, T(0));
  for (int64_t t = 0; t < kChunk; ++t) {
    for (int64_t s = t + 1; s < kChunk; ++s) cb[t * kChunk + s] = 0;
  }
}

// One head of one sequence. What it keeps from chunk to chunk is its `own`; what it needs within a
// chunk is `shared` with the other heads of its bunch.
template <typename E, typename T>
struct HeadScan {
  const SsdScan& p;
  const ScanLayout layout;
  const Sequence& sequence;
  const int64_t index, head, group;  // index: of the sequence
  T *S, *xd, *y, *G, *CaT, *BwT, *D;
  ChunkDecay<T> decay;
  // Of the current chunk:
  int64_t chunk = 0, time = 0, length = 0;
  const T *BT = nullptr, *CT = nullptr, *CB = nullptr;

  HeadScan(const SsdScan& p, int64_t index, int64_t head, T*& shared, T*& own)
      : p(p), layout(p), sequence(p.sequences[index]), index(index), head(head), group(head / (p.H / p.G)) {
    S = take(own, p.N * layout.padded);
    D = take(own, layout.padded);
    xd = take(shared, kChunk * layout.padded);
    y = take(shared, kChunk * layout.padded);
    G = take(shared, kChunk * kChunk);
    CaT = take(shared, p.N * kChunk);
    BwT = take(shared, p.N * kChunk);
    for (int64_t i = 0; i < layout.padded; ++i) {
      D[i] = p.D && i < p.P ? *at<T>(p.D, p.D_per_channel ? head * p.P + i : head) : T(0);
    }
  }

  static T* take(T*& scratch, int64_t count) {
    T* taken = scratch;
    scratch += count;
    return taken;
  }

  int64_t state_offset() const { return (index * p.H + head) * p.P * p.N; }

  // [P, N] of the API to [N, padded], or zeros.
  void load_state(const void* from, T* state) const {
    for (int64_t i = 0; i < p.N * layout.padded; ++i) state[i] = 0;
    if (!from) return;
    const T* source = at<T>(from, state_offset());
    for (int64_t i = 0; i < p.P; ++i) {
      for (int64_t n = 0; n < p.N; ++n) state[n * layout.padded + i] = source[i * p.N + n];
    }
  }

  void store_state(const T* state, void* to) const {
    T* target = static_cast<T*>(to) + state_offset();
    for (int64_t i = 0; i < p.P; ++i) {
      for (int64_t n = 0; n < p.N; ++n) target[i * p.N + n] = state[n * layout.padded + i];
    }
  }

  int64_t chunks() const { return (sequence.length + kChunk - 1) / kChunk; }

  void enter(int64_t at_chunk) {
    chunk = at_chunk;
    const int64_t begin = chunk * kChunk;
    time = sequence.begin + begin;
    length = sequence.length - begin < kChunk ? sequence.length - begin : kChunk;
    BT = static_cast<const T*>(p.workspace) + layout.tiles(sequence.first_chunk + chunk, group);
    CT = BT + p.N * kChunk;
    CB = CT + p.N * kChunk;
    compute_decay();
    load_rows(row<E>(p.x, sequence.batch, time, head), p.x.time, decay.dt, xd, length, kChunk, p.P, layout.padded);
  }

  void compute_decay() {
    T raw[kChunk] = {};
    const T bias = p.dt_bias ? *at<T>(p.dt_bias, head) : T(0);
    for (int64_t t = 0; t < length; ++t) raw[t] = *row<T>(p.dt, sequence.batch, time + t, head) + bias;
    const T A = *at<T>(p.A, head);
    for (int64_t t = 0; t < kChunk; t += kLanes<T>) {
      Vec<T> slope;
      const Vec<T> dt = time_step(load(raw + t), p.dt_softplus, T(p.dt_min), T(p.dt_max), slope);
      store(decay.dt + t, dt);
      store(decay.slope + t, slope);
      store(decay.a + t, exp(dt * A));
    }
    for (int64_t t = length; t < kChunk; ++t) {
      decay.dt[t] = decay.slope[t] = 0;
      decay.a[t] = 1;
    }
    if (p.seq_idx) {
      const int64_t* ids = p.seq_idx + sequence.batch * p.T + time;
      for (int64_t t = chunk == 0 ? 1 : 0; t < length; ++t) {
        if (ids[t] != ids[t - 1]) decay.a[t] = 0;
      }
    }
    T product = 1;
    for (int64_t t = 0; t < kChunk; ++t) decay.from_start[t] = product *= decay.a[t];
    decay.total = product;
    product = 1;
    for (int64_t t = kChunk - 1; t >= 0; --t) {
      decay.to_end[t] = product;
      product *= decay.a[t];
    }
  }

  // out = in * M elementwise, rows of M made on the way.
  void apply_decay(const T* in, T* out) const {
    T M[kChunk] = {};
    for (int64_t t = 0; t < kChunk; ++t) {
      const T a = decay.a[t];
      for (int64_t s = 0; s < kChunk; s += kLanes<T>) {
        const Vec<T> product = load(M + s) * a;
        // Subnormal numbers are slow and count for nothing here.
        store(M + s, product < T(1e-37) ? Vec<T>{} : product);
      }
      M[t] = 1;
      for (int64_t s = 0; s < kChunk; s += kLanes<T>) {
        store(out + t * kChunk + s, load(in + t * kChunk + s) * load(M + s));
      }
    }
  }

  void scale_columns(const T* in, const T* scale, T* out, int64_t rows) const {
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t t = 0; t < kChunk; t += kLanes<T>) {
        store(out + n * kChunk + t, load(in + n * kChunk + t) * load(scale + t));
      }
    }
  }

  // y without D and z, from the state before the chunk.
  void output(const T* state) {
    const int64_t width = layout.padded;
    apply_decay(CB, G);
    scale_columns(CT, decay.from_start, CaT, p.N);
    multiply(Matrix<T>{CaT, 1, kChunk}, state, width, y, width, length, width, p.N, T(0));
    multiply(Matrix<T>{G, kChunk, 1}, xd, width, y, width, length, width, kChunk, T(1), Shape::kLower);
  }

  // The state after the chunk; `to` may be `from`.
  void advance(const T* from, T* to) {
    const int64_t width = layout.padded;
    scale_columns(BT, decay.to_end, BwT, p.N);
    if (to != from) {
      for (int64_t i = 0; i < p.N * width; i += kLanes<T>) store(to + i, load(from + i));
    }
    multiply(Matrix<T>{BwT, kChunk, 1}, xd, width, to, width, p.N, width, length, decay.total);
  }

  void forward(int64_t at_chunk) {
    enter(at_chunk);
    output(S);
    store_output();
    advance(S, S);
  }

  void store_output() const {
    for (int64_t t = 0; t < length; ++t) {
      const E* x = row<E>(p.x, sequence.batch, time + t, head);
      const E* z = p.z.data ? row<E>(p.z, sequence.batch, time + t, head) : nullptr;
      E* to = static_cast<E*>(p.y) + ((sequence.batch * p.T + time + t) * p.H + head) * p.P;
      for (int64_t i = 0; i < p.P; i += kLanes<T>) {
        Vec<T> value = load(y + t * layout.padded + i) + load(D + i) * load(x + i, p.P - i);
        if (z) value *= silu(load(z + i, p.P - i));
        store(to + i, value, p.P - i);
      }
    }
  }
};

// Heads [begin, end) of all sequences' heads, a few of a sequence at a time: the rows of one head lie
// a page or more apart, and those of its neighbours in the same pages.
template <typename E, typename T>
void scan_heads(const SsdScan& p, int64_t begin, int64_t end, void* memory) {
  int64_t bunch = 0;
  for (int64_t first = begin; first < end; first += bunch) {
    const int64_t index = first / p.H, head = first % p.H;
    bunch = end - first < p.H - head ? end - first : p.H - head;
    if (bunch > kBunch) bunch = kBunch;
    T* own = static_cast<T*>(memory) + ScanLayout(p).shared();
    auto scan = [&](int64_t i) {
      T* shared = static_cast<T*>(memory);
      return HeadScan<E, T>(p, index, head + (i < bunch ? i : 0), shared, own);
    };
    HeadScan<E, T> heads[kBunch] = {scan(0), scan(1), scan(2), scan(3)};
    for (int64_t i = 0; i < bunch; ++i) heads[i].load_state(p.initial_states, heads[i].S);
    for (int64_t c = 0; c < heads[0].chunks(); ++c) {
      for (int64_t i = 0; i < bunch; ++i) heads[i].forward(c);
    }
    for (int64_t i = 0; i < bunch; ++i) heads[i].store_state(heads[i].S, p.final_states);
  }
}

}  // namespace
}  // namespace bitkernels::cpu
