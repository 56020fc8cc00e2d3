// One token of the scan: the state is read once and written once.
//
// A row of the state is taken by as many lanes as hold 128 of its elements, 16 bytes each; a warp takes kRows rows a
// lane. Where there is little to do, their loads are all under way together, in registers. Where there is much, the
// copy engine brings a block's rows to shared memory and back: registers then hold no more than what is being computed.
// The kernel may start while the one before it runs: it then brings its states as far as L2. Blocks also ask for the
// states of blocks that start later, so that memory is never idle while they compute.
#include <algorithm>
#include <cfloat>
#include <initializer_list>
#include <type_traits>

#include "hopper.cuh"
#include "launch.cuh"
#include "mixer_kernels.h"
#include "ptx.cuh"
#include "reduce.cuh"
#include "step.cuh"
#include "stochastic_round.cuh"
#include "types.cuh"

namespace bitkernels::cuda {
namespace {

constexpr int kStepWarps = 4;
constexpr int kStepThreads = 32 * kStepWarps;
constexpr int kChunk = 128;  // elements of a row at once

// Division of what is below 2^31 by a number known at launch.
struct Divisor {
  uint32_t by, multiplier, shift;

  explicit Divisor(int64_t divisor) : by(static_cast<uint32_t>(divisor)), shift(0) {
    while (int64_t(1) << shift < divisor) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t(1) << shift) - by) << 32) / by + 1);
  }
  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

struct StepArgs {
  SsdStep p;
  Divisor blocks_of_head, heads, heads_of_group;
  uint32_t first_blocks;  // which may start early
  uint32_t ahead;         // from a block to that whose states it asks for; none where rows do not follow each other
};

template <typename S>
struct Lanes {
  static constexpr int kElements = 16 / sizeof(S);
  static constexpr int kOfRow = kChunk / kElements;
  static constexpr int kRowsOfWarp = 32 / kOfRow;  // side by side
};

template <typename S, int kRows>
constexpr int kBlockRows = kStepWarps * kRows * Lanes<S>::kRowsOfWarp;

// Where a block works.
struct Place {
  uint32_t head_of_batch, batch, head;
  int row;  // of the head, its first

  __device__ Place(const StepArgs& args, uint32_t block, int block_rows)
      : head_of_batch(args.blocks_of_head.quotient(block)),
        batch(args.heads.quotient(head_of_batch)),
        head(head_of_batch - batch * args.heads.by),
        row(static_cast<int>(block - head_of_batch * args.blocks_of_head.by) * block_rows) {}
};

// kCount neighbours of a row, as words.
template <typename T, int kCount>
struct Elements {
  static constexpr int kWords = kCount * sizeof(T) / 4;
  static_assert(kWords == 2 || kWords % 4 == 0);
  uint32_t words[kWords];

  // From `from` on, of which `left` exist; zero beyond. kVector: all or none, aligned.
  template <bool kVector>
  __device__ void load(const T* from, int left) {
    if constexpr (!kVector) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) set(i, i < left ? from[i] : from_float<T>(0.0f));
    } else if constexpr (kWords == 2) {
      const uint2 v = left > 0 ? *reinterpret_cast<const uint2*>(from) : uint2{};
      words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = left > 0 ? reinterpret_cast<const uint4*>(from)[i / 4] : uint4{};
        words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
      }
    }
  }

  template <bool kVector>
  __device__ void store(T* to, int left) const {
    if constexpr (!kVector) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i < left) to[i] = at(i);
      }
    } else {
      static_assert(kWords == 4);
      if (left > 0) store_vector(to, words);
    }
  }

  __device__ T at(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      const auto half = static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2));
      if constexpr (std::is_same_v<T, bf16>) return __ushort_as_bfloat16(half);
      if constexpr (std::is_same_v<T, fp16>) return __ushort_as_half(half);
    }
  }
  __device__ float operator[](int i) const {
    // In one instruction, where it was two for the upper half.
    if constexpr (std::is_same_v<T, bf16>)
      return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    return to_float(at(i));
  }

  __device__ void set(int i, T v) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(v);
    } else {
      uint32_t bits;
      if constexpr (std::is_same_v<T, bf16>) bits = __bfloat16_as_ushort(v);
      if constexpr (std::is_same_v<T, fp16>) bits = __half_as_ushort(v);
      words[i / 2] = i % 2 ? (words[i / 2] & 0xffffu) | bits << 16 : bits;
    }
  }
};

__device__ float softplus(float v) { return fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v))); }

__device__ float step_size(const SsdStep& p, float dt) {
  if (p.dt_softplus) dt = softplus(dt);
  const float low = static_cast<float>(p.dt_min), high = static_cast<float>(p.dt_max);
  return dt < low ? low : dt > high ? high : dt;  // NaN stays
}

// kLanes neighbours hold parts of kCount sums: each gets one sum, kLanes / kCount of them the same.
template <int kLanes, int kCount>
__device__ float sum_of_lane(const float (&v)[kCount]) {
  if constexpr (kCount == 1) {
    return add_lanes(v[0], 1, kLanes);
  } else {
    float half[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) half[i] = add_halves(v[i], v[i + kCount / 2], kLanes / 2);
    return sum_of_lane<kLanes / 2>(half);
  }
}

template <typename T>
constexpr DType kTypeOf = std::is_same_v<T, float>  ? DType::kFloat32
                          : std::is_same_v<T, fp16> ? DType::kFloat16
                                                    : DType::kBFloat16;

// What depends on the value happens after this, and what makes it before.
__device__ inline void settle(uint32_t& v) { asm volatile("" : "+r"(v)); }
template <typename T>
__device__ void settle(T*& p) {
  asm volatile("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
}

// What a lane reads beside the state.
template <typename T>
struct Inputs {
  const T *x, *z, *B, *C;
  const float *A, *dt_bias, *D;
  const uint16_t* dt;  // in one or two halves

  // Of a row, and of columns from n on.
  __device__ void find(const StepArgs& args, const Place& at, int row, int n) {
    const SsdStep& p = args.p;
    const auto view = [&](const Strided& v, uint32_t head) {
      return static_cast<const T*>(v.data) + at.batch * v.batch + head * v.head;
    };
    const uint32_t group = args.heads_of_group.quotient(at.head);
    x = view(p.x, at.head) + row;
    z = p.z.data ? view(p.z, at.head) + row : nullptr;
    B = view(p.B, group) + n, C = view(p.C, group) + n;
    A = static_cast<const float*>(p.A) + at.head;
    dt_bias = p.dt_bias ? static_cast<const float*>(p.dt_bias) + at.head : nullptr;
    D = p.D ? static_cast<const float*>(p.D) + (p.D_per_channel ? at.head * p.P + row : at.head) : nullptr;
    dt = static_cast<const uint16_t*>(p.dt.data) +
         ((at.batch * p.dt.batch + at.head * p.dt.head) << (p.dt_dtype == DType::kFloat32));
  }

  __device__ void settle_all() {
    settle(x), settle(z), settle(B), settle(C), settle(A), settle(dt_bias), settle(D), settle(dt);
  }

  __device__ void prefetch() const {
    if (threadIdx.x == 0) prefetch_to_l2(A);
    if (threadIdx.x == 32 && dt_bias) prefetch_to_l2(dt_bias);
    if (threadIdx.x == 64 && D) prefetch_to_l2(D);
  }
};

// kVector: rows of the state, of B and of C are whole vectors. kTile: and chunks, and follow each other.
template <typename T, typename S, int kRows, bool kVector, bool kRandom, bool kTile>
__device__ void step(const StepArgs& args) {
  using L = Lanes<S>;
  constexpr int kElements = L::kElements, kBlock = kBlockRows<S, kRows>;
  const SsdStep& p = args.p;
  const int P = static_cast<int>(p.P);
  const Place at(args, blockIdx.x, kBlock);
  const int lane = threadIdx.x % 32;
  const int part = lane % L::kOfRow;
  const int n0 = part * kElements;
  // Row r of a lane is first + r * kRowsOfWarp.
  const int first = at.row + threadIdx.x / 32 * (kBlock / kStepWarps) + lane / L::kOfRow;
  // Of the rows of this warp, the lane finishes row `own`, as its neighbours of kLanesOfSum do.
  constexpr int kLanesOfSum = L::kOfRow / kRows;
  const int own = first + part / kLanesOfSum * L::kRowsOfWarp;
  const bool stores = own < P && part % kLanesOfSum == 0;

  const int own_read = min(own, P - 1);  // a lane without a row reads the last one
  S* block_state = static_cast<S*>(p.state) + at.head * p.state_head + at.row * p.state_row;
  S* state = block_state + (first - at.row) * p.state_row + n0;
  const int64_t row_step = L::kRowsOfWarp * p.state_row;
  Inputs<T> from;
  if constexpr (!kTile) {
    // Addresses are made before the wait, as time is short after it.
    from.find(args, at, own_read, n0);
    from.settle_all(), settle(state);
    from.prefetch();
  }

  // The slot may still change, and then the prefetch was in vain. Row by row the states come sooner, all at once they
  // cost less.
  const int rows = min(P - at.row, kBlock), row_bytes = static_cast<int>(p.N * sizeof(S));
  if (kVector && blockIdx.x < args.first_blocks) {
    constexpr int kAtOnce = kTile ? kBlock : 1;
    const int64_t slot = slot_of(p.state_indices, p.slots, at.batch);
#pragma unroll 1
    for (int r = threadIdx.x * kAtOnce; slot >= 0 && r < rows; r += kStepThreads * kAtOnce) {
      prefetch_to_l2(block_state + slot * p.state_batch + r * p.state_row, min(rows - r, kAtOnce) * row_bytes);
    }
  }
  let_next_kernel_start();
  wait_for_previous_kernel();

  const int64_t slot = slot_of(p.state_indices, p.slots, at.batch);
  if (slot < 0) {
    if (stores) static_cast<T*>(p.y)[int64_t(at.head_of_batch) * P + own] = from_float<T>(0.0f);
    return;
  }
  block_state += slot * p.state_batch;
  state += slot * p.state_batch;
  extern __shared__ __align__(128) unsigned char tile[];
  __shared__ uint64_t arrived;
  const SharedAddress shared = shared_address(tile) + (first - at.row) * row_bytes + n0 * sizeof(S);
  const auto shared_row = [&](int r, int64_t chunk) {
    return shared + r * L::kRowsOfWarp * row_bytes + static_cast<int>(chunk * sizeof(S));
  };
  if constexpr (kTile) {
    if (threadIdx.x == 0) {
      barrier_init(shared_address(&arrived), 1);
      barrier_init_fence();
      barrier_arrive_expecting(shared_address(&arrived), rows * row_bytes);
      load_bytes(shared_address(tile), block_state, rows * row_bytes, shared_address(&arrived));
    }
    __syncthreads();
    from.find(args, at, own_read, n0);
  }
  // Both halves, as a branch on the type would wait for what it loads.
  uint32_t dt_low = from.dt[0], dt_high = from.dt[p.dt_dtype == DType::kFloat32];
  Elements<S, kElements> held[kRows];
  const auto left_of = [&](int64_t chunk) { return static_cast<int>(min(p.N - n0 - chunk, int64_t(kElements))); };
  const auto left_of_row = [&](int r, int left) { return first + r * L::kRowsOfWarp < P ? left : 0; };
  const auto load_states = [&](int64_t chunk) {
    if constexpr (kTile) return;
    const int left = left_of(chunk);
#pragma unroll
    for (int r = 0; r < kRows; ++r) held[r].template load<kVector>(state + r * row_step + chunk, left_of_row(r, left));
  };
  Elements<T, kElements> B, C;
  const auto load_inputs = [&](int64_t chunk) {
    const int left = left_of(chunk);
    B.template load<kVector>(from.B + chunk, left);
    C.template load<kVector>(from.C + chunk, left);
  };
  load_states(0);
  load_inputs(0);
  uint32_t own_x = bits_of(*from.x);
  const T own_z = from.z ? *from.z : from_float<T>(0.0f);
  const float own_D = from.D ? *from.D : 0.0f;
  const float A = *from.A, dt_bias = from.dt_bias ? *from.dt_bias : 0.0f;
  int64_t seed = 0, position = 0;
  if constexpr (kRandom) seed = p.seed[at.batch], position = p.position[at.batch];
  // Asks for the states of a block that starts later.
  if (kVector && threadIdx.x == 96 && args.ahead > 0 && blockIdx.x + args.ahead < gridDim.x) {
    const Place later(args, blockIdx.x + args.ahead, kBlock);
    const int64_t slot = slot_of(p.state_indices, p.slots, later.batch);
    const S* states = static_cast<const S*>(p.state) + slot * p.state_batch + later.head * p.state_head;
    if (slot >= 0) prefetch_to_l2(states + later.row * p.state_row, min(P - later.row, kBlock) * row_bytes);
  }

  float decay = 0.0f, own_scaled = 0.0f;
  float sum[kRows] = {};
  // A count that all lanes share, so that the warp stays one.
#pragma unroll 1
  for (int64_t chunk = 0; chunk < p.N; chunk += kChunk) {
    if (chunk > 0) load_states(chunk), load_inputs(chunk);
    // The first bits are drawn while states and step are on their way.
    constexpr int kDrawn = kRandom ? kRows < 4 ? kRows : 4 : 1;
    uint32_t random_row = at.head * P + first, random_group = static_cast<uint32_t>((n0 + chunk) / 8);
    settle(random_row), settle(random_group);
    RandomBits<kDrawn> random;
    if constexpr (kRandom) random.draw(seed, position, random_row, L::kRowsOfWarp, random_group);
    if (chunk == 0) {
      settle(dt_low), settle(dt_high), settle(own_x);
      const float dt = step_size(p, from_bits(p.dt_dtype, dt_low | dt_high << 16) + dt_bias);
      decay = expf(dt * A);
      own_scaled = dt * from_bits(kTypeOf<T>, own_x);
      if constexpr (kTile) barrier_wait(shared_address(&arrived), 0);
    }
    const int left = left_of(chunk);
    constexpr int kTogether = 2;
#pragma unroll
    for (int two = 0; two < kRows; two += kTogether) {
      if (kRandom && two > 0 && two % kDrawn == 0) {
        random.draw(seed, position, random_row + two * L::kRowsOfWarp, L::kRowsOfWarp, random_group);
      }
      float next[kTogether][kElements];
      bool finite = true;
#pragma unroll
      for (int i_row = 0; i_row < kTogether; ++i_row) {
        const int r = two + i_row;
        if constexpr (kTile) load_words(shared_row(r, chunk), held[r].words);
        const float scaled = __shfl_sync(0xffffffff, own_scaled, r * kLanesOfSum, L::kOfRow);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          next[i_row][i] = fmaf(scaled, B[i], decay * held[r][i]);
          sum[r] = fmaf(next[i_row][i], C[i], sum[r]);
        }
        finite = finite && fabsf(sum[r]) <= FLT_MAX;
      }
#pragma unroll
      for (int i_row = 0; i_row < kTogether; ++i_row) {
        const int r = two + i_row;
        const float (&v)[kElements] = next[i_row];
        if constexpr (kRandom) {
          // A sum of what is infinite or NaN is, too.
          if (!finite) random.clear_unless_finite(r % kDrawn, v);
#pragma unroll
          for (int i = 0; i < kElements; i += 2) {
            held[r].words[i / 2] = round_stochastically<S>(v[i], v[i + 1], random.pair(r % kDrawn, i / 2));
          }
        } else {
#pragma unroll
          for (int i = 0; i < kElements; ++i) held[r].set(i, from_float<S>(v[i]));
        }
        if constexpr (kTile) {
          store_words(shared_row(r, chunk), held[r].words);
        } else {
          held[r].template store<kVector>(state + r * row_step + chunk, left_of_row(r, left));
        }
      }
    }
  }
  if constexpr (kTile) {
    copy_engine_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
      store_bytes(block_state, shared_address(tile), rows * row_bytes);
      commit_stores();
    }
  }

  float out = fmaf(own_D, from_bits(kTypeOf<T>, own_x), sum_of_lane<L::kOfRow>(sum));
  if (from.z) out *= silu(to_float(own_z));
  if (stores) static_cast<T*>(p.y)[int64_t(at.head_of_batch) * P + own] = from_float<T>(out);
  if constexpr (kTile) {
    if (threadIdx.x == 0) wait_for_stores_to_read();
  }
}

// After a projection, where all blocks run at once: a block takes its rows of fp32, of one chunk, in turns, of which
// two are on their way, so that what belongs to the head is found once.
constexpr int kBlocksInTurns = 5;  // of a processor
constexpr int kTurnRows = 4;       // of a warp

template <typename T, int kTurns>
__global__ void __launch_bounds__(kStepThreads, kBlocksInTurns)
    ssd_step_in_turns_kernel(const __grid_constant__ StepArgs args) {
  using L = Lanes<float>;
  constexpr int kElements = L::kElements, kTurn = kBlockRows<float, kTurnRows>;
  constexpr int kAhead = kTurns < 2 ? kTurns : 2;
  constexpr int kLanesOfRow = L::kOfRow / kTurnRows;  // that finish row r of every turn
  const SsdStep& p = args.p;
  const int P = static_cast<int>(p.P);
  const Place at(args, blockIdx.x, kTurns * kTurn);
  const int lane = threadIdx.x % 32;
  // Row r of turn t is first + t * kTurn + r; the lane finishes one.
  const int first = at.row + threadIdx.x / 32 * kTurnRows;
  const int own = first + lane % kTurns * kTurn + lane / kLanesOfRow;
  const bool stores = own < P && lane % kLanesOfRow < kTurns;
  float* state = static_cast<float*>(p.state) + at.head * p.state_head + first * p.state_row + lane * kElements;
  const int64_t turn_step = kTurn * p.state_row;
  Inputs<T> from;
  from.find(args, at, min(own, P - 1), lane * kElements);
  from.settle_all(), settle(state);
  from.prefetch();
  let_next_kernel_start();
  wait_for_previous_kernel();

  const int64_t slot = slot_of(p.state_indices, p.slots, at.batch);
  if (slot < 0) {
    if (stores) static_cast<T*>(p.y)[int64_t(at.head_of_batch) * P + own] = from_float<T>(0.0f);
    return;
  }
  state += slot * p.state_batch;
  Elements<float, kElements> held[kAhead][kTurnRows];
  const auto left_of_row = [&](int t, int r) { return first + t * kTurn + r < P ? kElements : 0; };
  const auto load_turn = [&](int t) {
#pragma unroll
    for (int r = 0; r < kTurnRows; ++r) {
      held[t % kAhead][r].template load<true>(state + t * turn_step + r * p.state_row, left_of_row(t, r));
    }
  };
  uint32_t dt_low = from.dt[0], dt_high = from.dt[p.dt_dtype == DType::kFloat32];
#pragma unroll
  for (int t = 0; t < kAhead; ++t) load_turn(t);
  Elements<T, kElements> B, C;
  B.template load<true>(from.B, kElements);
  C.template load<true>(from.C, kElements);
  uint32_t own_x = bits_of(*from.x);
  const T own_z = from.z ? *from.z : from_float<T>(0.0f);
  const float own_D = from.D ? *from.D : 0.0f;
  const float A = *from.A, dt_bias = from.dt_bias ? *from.dt_bias : 0.0f;
  settle(dt_low), settle(dt_high), settle(own_x);
  const float dt = step_size(p, from_bits(p.dt_dtype, dt_low | dt_high << 16) + dt_bias);
  const float decay = expf(dt * A), own_scaled = dt * from_bits(kTypeOf<T>, own_x);

  float sum[kTurns];
#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
    float of_row[kTurnRows] = {};
#pragma unroll
    for (int r = 0; r < kTurnRows; ++r) {
      Elements<float, kElements>& row = held[t % kAhead][r];
#pragma unroll
      for (uint32_t& word : row.words) settle(word);
      const float scaled = __shfl_sync(0xffffffff, own_scaled, r * kLanesOfRow + t);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const float next = fmaf(scaled, B[i], decay * row[i]);
        of_row[r] = fmaf(next, C[i], of_row[r]);
        row.set(i, next);
      }
      if (left_of_row(t, r)) store_streaming(state + t * turn_step + r * p.state_row, row.words);
    }
    if (t + kAhead < kTurns) load_turn(t + kAhead);
    sum[t] = add_halves(add_halves(of_row[0], of_row[2], 16), add_halves(of_row[1], of_row[3], 16), 8);
  }
  // In the order of step(), so that the bits are the same: a lane's turn is in its lowest bits.
  float total;
  if constexpr (kTurns == 1) total = add_lanes(sum[0], 1, kLanesOfRow);
  if constexpr (kTurns == 2) total = add_lanes(add_halves(sum[0], sum[1], 1), 2, kLanesOfRow);
  if constexpr (kTurns == 4) {
    total = add_lanes(add_halves(add_halves(sum[0], sum[1], 1), add_halves(sum[2], sum[3], 1), 2), 4, kLanesOfRow);
  }
  float out = fmaf(own_D, from_bits(kTypeOf<T>, own_x), total);
  if (from.z) out *= silu(to_float(own_z));
  if (stores) static_cast<T*>(p.y)[int64_t(at.head_of_batch) * P + own] = from_float<T>(out);
}

// Of a processor, by the registers that eight neighbours of B and C, or random bits, take.
template <typename T, typename S, int kRows, bool kRandom>
constexpr int kBlocksAtOnce = sizeof(S) == 2 && kRows > 2 && (kRandom || sizeof(T) == 4) ? 5 : 6;

template <typename T, typename S, int kRows, bool kVector, bool kRandom, bool kTile>
__global__ void __launch_bounds__(kStepThreads, kBlocksAtOnce<T, S, kRows, kRandom>)
    ssd_step_kernel(const __grid_constant__ StepArgs args) {
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (!kTile)
#endif
    step<T, S, kRows, kVector, kRandom, kTile>(args);
}

template <typename T, typename S, int kRows, bool kVector, bool kRandom, bool kTile = false>
void run_step(const SsdStep& p, int64_t processors, cudaStream_t stream) {
  constexpr int64_t kBlocksOfProcessor = 2048 / kStepThreads;
  // What is in flight and what is ahead must fit in L2, of which a processor's own half may hold copies.
  const int64_t most_ahead = device_attribute(cudaDevAttrL2CacheSize) / 8;
  const int64_t blocks_of_head = ceil_div(p.P, int64_t(kBlockRows<S, kRows>));
  const int64_t block_bytes = kBlockRows<S, kRows> * p.N * sizeof(S);
  Grid grid = step_grid(dim3(static_cast<unsigned>(p.batch * p.H * blocks_of_head)), kStepThreads);
  if (kTile) grid.shared_bytes = block_bytes;
  launch(ssd_step_kernel<T, S, kRows, kVector, kRandom, kTile>, grid, stream,
         StepArgs{p, Divisor(blocks_of_head), Divisor(p.H), Divisor(p.H / p.G),
                  static_cast<uint32_t>(processors * kBlocksOfProcessor),
                  static_cast<uint32_t>(p.state_row == p.N && p.N > 0 ? most_ahead / block_bytes : 0)});
}

// Tells whether the state is as much as this is for.
template <typename T, int kTurns>
bool run_in_turns(const SsdStep& p, int64_t processors, cudaStream_t stream) {
  const int64_t blocks_of_head = ceil_div(p.P, int64_t(kTurns * kBlockRows<float, kTurnRows>));
  const int64_t blocks = p.batch * p.H * blocks_of_head;
  if (2 * blocks <= kBlocksInTurns * processors || blocks > kBlocksInTurns * processors) return false;
  Grid grid = step_grid(dim3(static_cast<unsigned>(blocks)), kStepThreads);
  // Shared memory that nobody uses, so that processors that are free first leave the others their share.
  constexpr int64_t kReserved = 1024;
  const int64_t share = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / ceil_div(blocks, processors);
  grid.shared_bytes = share / kReserved * kReserved - kReserved;
  launch(ssd_step_in_turns_kernel<T, kTurns>, grid, stream,
         StepArgs{p, Divisor(blocks_of_head), Divisor(p.H), Divisor(p.H / p.G), 0, 0});
  return true;
}

bool whole_vectors(const void* data, int64_t bytes, std::initializer_list<int64_t> strides) {
  bool whole = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t stride : strides) whole = whole && stride * bytes % 16 == 0;
  return whole;
}

template <typename T, typename S, bool kRandom>
void run_step(const SsdStep& p, cudaStream_t stream) {
  constexpr int64_t kElements = Lanes<S>::kElements;
  const auto of_B = [&](const Strided& v) {
    const int64_t bytes = kElements * sizeof(T) < 16 ? 16 / kElements : sizeof(T);
    return whole_vectors(v.data, bytes, {v.batch, v.head});
  };
  const bool vectors = p.N % kElements == 0 && of_B(p.B) && of_B(p.C) &&
                       whole_vectors(p.state, sizeof(S), {p.state_batch, p.state_head, p.state_row, p.N});
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  if (!vectors) return run_step<T, S, 4, false, kRandom>(p, processors, stream);
  // Tiles of much state, and sooner where they make room for random bits.
  constexpr int64_t kMuch = kRandom ? 16 << 20 : 64 << 20, kMostTileBytes = 64 << 10;
  const int64_t rows = p.batch * p.H * p.P;
  if (on_hopper() && rows * p.N * sizeof(S) >= kMuch && p.state_row == p.N && p.N % kChunk == 0 &&
      kBlockRows<S, 8> * p.N * sizeof(S) <= kMostTileBytes) {
    return run_step<T, S, 8, true, kRandom, true>(p, processors, stream);
  }
  if constexpr (sizeof(S) == 4) {
    // One token's projection leaves room for blocks that come and go.
    if (p.after_projection && p.batch > 1 && p.N == kChunk &&
        (run_in_turns<T, 1>(p, processors, stream) || run_in_turns<T, 2>(p, processors, stream) ||
         run_in_turns<T, 4>(p, processors, stream))) {
      return;
    }
  }
  // Few rows a lane while all blocks run at once.
  if constexpr (sizeof(S) == 2) {
    if (rows <= kBlocksAtOnce<T, S, 2, kRandom> * processors * kBlockRows<S, 2>) {
      return run_step<T, S, 2, true, kRandom>(p, processors, stream);
    }
  }
  run_step<T, S, 4, true, kRandom>(p, processors, stream);
}

template <typename T, typename S>
void run_step(const SsdStep& p, cudaStream_t stream) {
  if constexpr (sizeof(S) == 2) {
    if (p.seed) return run_step<T, S, true>(p, stream);
  }
  run_step<T, S, false>(p, stream);
}

}  // namespace

void ssd_step(const SsdStep& p, Executor stream) {
  if (p.batch * p.H * p.P == 0) return;
  dispatch_float(p.dtype, [&](auto t) {
    dispatch_float(p.state_dtype, [&](auto s) { run_step<decltype(t), decltype(s)>(p, stream); });
  });
}

}  // namespace bitkernels::cuda
