// One token of the scan: the state is read once and written once.
//
// A row of the state is taken by as many lanes as hold 128 of its elements, 16 bytes each; a warp takes kRows rows a
// lane at once, so that all of their loads are under way together. The kernel may start while the one before it runs:
// it then brings its states as far as L2.
#include <cfloat>
#include <initializer_list>
#include <type_traits>

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

struct StepArgs {
  SsdStep p;
  uint32_t blocks_of_head, heads, heads_of_group;
  uint32_t first_blocks;  // which may start early
};

template <typename S>
struct Lanes {
  static constexpr int kElements = 16 / sizeof(S);
  static constexpr int kOfRow = kChunk / kElements;
  static constexpr int kRowsOfWarp = 32 / kOfRow;  // side by side
};

// kCount neighbours of a row, as words.
template <typename T, int kCount>
struct Elements {
  static constexpr int kWords = kCount * sizeof(T) / 4;
  static_assert(kWords == 2 || kWords % 4 == 0);
  uint32_t words[kWords];

  // From `from` on, of which `left` exist; zero beyond. kVector: all or none, aligned.
  template <bool kVector>
  __device__ void load(const T* from, int64_t left) {
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
  __device__ void store(T* to, int64_t left) const {
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
  __device__ float operator[](int i) const { return to_float(at(i)); }

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

// kVector: rows of the state, of B and of C are whole vectors.
template <typename T, typename S, int kRows, bool kVector>
__global__ void __launch_bounds__(kStepThreads, kRows < 8 ? 6 : 4)
    ssd_step_kernel(const __grid_constant__ StepArgs args) {
  using L = Lanes<S>;
  constexpr int kElements = L::kElements;
  constexpr int kWarpRows = kRows * L::kRowsOfWarp;
  const SsdStep& p = args.p;
  const uint32_t head_of_batch = blockIdx.x / args.blocks_of_head;
  const int64_t batch = head_of_batch / args.heads;
  const uint32_t head = head_of_batch % args.heads;
  const int64_t group = head / args.heads_of_group;
  const int64_t first_row = (blockIdx.x - head_of_batch * args.blocks_of_head) * (kStepWarps * kWarpRows);
  const int lane = threadIdx.x % 32;
  const int part = lane % L::kOfRow;
  // Row r of a lane is first + r * kRowsOfWarp.
  const int64_t first = first_row + threadIdx.x / 32 * kWarpRows + lane / L::kOfRow;

  S* head_state = static_cast<S*>(p.state) + head * p.state_head;
  if (threadIdx.x == 0) prefetch_to_l2(static_cast<const float*>(p.A) + head);
  if (threadIdx.x == 32 && p.dt_bias) prefetch_to_l2(static_cast<const float*>(p.dt_bias) + head);
  if (threadIdx.x == 64 && p.D) prefetch_to_l2(static_cast<const float*>(p.D) + (p.D_per_channel ? head * p.P : head));
  // The slot may still change, and then the prefetch was in vain.
  if (kVector && blockIdx.x < args.first_blocks) {
    const int64_t slot = slot_of(p.state_indices, p.slots, batch);
    const int64_t rows = min(p.P - first_row, int64_t(kStepWarps * kWarpRows));
    if (slot >= 0) {
      for (int64_t r = threadIdx.x; r < rows; r += kStepThreads) {
        prefetch_to_l2(head_state + slot * p.state_batch + (first_row + r) * p.state_row,
                       static_cast<uint32_t>(p.N * sizeof(S)));
      }
    }
  }
  let_next_kernel_start();
  wait_for_previous_kernel();

  // Of the rows of this warp, the lane finishes row `own`, as its neighbours of kLanesOfSum do.
  constexpr int kLanesOfSum = L::kOfRow / kRows;
  const int own = part / kLanesOfSum;
  const int64_t own_row = first + own * L::kRowsOfWarp;
  const bool has_own = own_row < p.P;
  const bool stores = has_own && part % kLanesOfSum == 0;
  const int64_t y_at = int64_t(head_of_batch) * p.P + own_row;
  const int64_t slot = slot_of(p.state_indices, p.slots, batch);
  if (slot < 0) {
    if (stores) static_cast<T*>(p.y)[y_at] = from_float<T>(0.0f);
    return;
  }
  S* state = head_state + slot * p.state_batch;
  const int64_t n0 = part * kElements;
  Elements<S, kElements> held[kRows];
  const auto load_states = [&](int64_t n) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * L::kRowsOfWarp;
      held[r].template load<kVector>(state + row * p.state_row + n, row < p.P ? p.N - n : 0);
    }
  };
  load_states(n0);
  const auto view = [&](const Strided& v, int64_t h) {
    return static_cast<const T*>(v.data) + batch * v.batch + h * v.head;
  };
  Elements<T, kElements> B, C;
  const auto load_inputs = [&](int64_t n) {
    B.template load<kVector>(view(p.B, group) + n, p.N - n);
    C.template load<kVector>(view(p.C, group) + n, p.N - n);
  };
  load_inputs(n0);
  const float own_x = has_own ? to_float(view(p.x, head)[own_row]) : 0.0f;
  const float own_z = p.z.data && has_own ? to_float(view(p.z, head)[own_row]) : 0.0f;
  float own_D = 0.0f;
  if (p.D && has_own) own_D = static_cast<const float*>(p.D)[p.D_per_channel ? head * p.P + own_row : head];
  const float A = static_cast<const float*>(p.A)[head];
  const float dt_bias = p.dt_bias ? static_cast<const float*>(p.dt_bias)[head] : 0.0f;
  // Last, as to convert it is to wait for it.
  float dt = load(p.dt.data, p.dt_dtype, batch * p.dt.batch + head * p.dt.head) + dt_bias;
  if (p.dt_softplus) dt = softplus(dt);
  const float low = static_cast<float>(p.dt_min), high = static_cast<float>(p.dt_max);
  dt = dt < low ? low : dt > high ? high : dt;  // NaN stays
  const float decay = expf(dt * A);
  const float own_scaled = dt * own_x;
  const RandomKeys keys(p.seed ? p.seed[batch] : 0);
  const int64_t position = p.seed ? p.position[batch] : 0;

  float sum[kRows] = {};
  // A count that all lanes share, so that the warp stays one.
#pragma unroll 1
  for (int64_t chunk = 0; chunk < p.N; chunk += kChunk) {
    const int64_t n = n0 + chunk;
    if (chunk > 0) load_states(n);
    if (chunk > 0) load_inputs(n);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * L::kRowsOfWarp;
      const float scaled = __shfl_sync(0xffffffff, own_scaled, r * kLanesOfSum, L::kOfRow);
      float next[kElements];
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        next[i] = fmaf(scaled, B[i], decay * held[r][i]);
        sum[r] = fmaf(next[i], C[i], sum[r]);
      }
      if constexpr (sizeof(S) == 2) {
        if (p.seed) {
          const RandomBits bits(keys, position, head * p.P + row, n / 8);
          // A sum of what is infinite or NaN is, too.
          if (fabsf(sum[r]) <= FLT_MAX) {
#pragma unroll
            for (int i = 0; i < kElements; i += 2) {
              held[r].words[i / 2] = round_finite<S>(next[i], next[i + 1], bits.pair(i / 2));
            }
          } else {
#pragma unroll
            for (int i = 0; i < kElements; ++i) {
              held[r].set(i, round_stochastically<S>(next[i], bits.pair(i / 2) >> 16 * (i % 2) & 0xffffu));
            }
          }
        } else {
#pragma unroll
          for (int i = 0; i < kElements; ++i) held[r].set(i, from_float<S>(next[i]));
        }
      } else {
#pragma unroll
        for (int i = 0; i < kElements; ++i) held[r].set(i, next[i]);
      }
      held[r].template store<kVector>(state + row * p.state_row + n, row < p.P ? p.N - n : 0);
    }
  }

  float out = fmaf(own_D, own_x, sum_of_lane<L::kOfRow>(sum));
  if (!stores) return;
  if (p.z.data) out *= silu(own_z);
  static_cast<T*>(p.y)[y_at] = from_float<T>(out);
}

template <typename T, typename S, int kRows>
void run_step(const SsdStep& p, int64_t processors, bool vectors, cudaStream_t stream) {
  constexpr int64_t kBlockRows = kStepWarps * kRows * Lanes<S>::kRowsOfWarp;
  constexpr int64_t kBlocksOfProcessor = 2048 / kStepThreads;
  const int64_t blocks_of_head = ceil_div(p.P, kBlockRows);
  const int64_t blocks = p.batch * p.H * blocks_of_head;
  launch(vectors ? ssd_step_kernel<T, S, kRows, true> : ssd_step_kernel<T, S, kRows, false>,
         step_grid(dim3(static_cast<unsigned>(blocks)), kStepThreads), stream,
         StepArgs{p, static_cast<uint32_t>(blocks_of_head), static_cast<uint32_t>(p.H),
                  static_cast<uint32_t>(p.H / p.G), static_cast<uint32_t>(processors * kBlocksOfProcessor)});
}

bool whole_vectors(const void* data, int64_t bytes, std::initializer_list<int64_t> strides) {
  bool whole = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t stride : strides) whole = whole && stride * bytes % 16 == 0;
  return whole;
}

// Few rows a lane while blocks are few, else enough loads under way to use the memory.
template <typename T, typename S>
void run_step(const SsdStep& p, cudaStream_t stream) {
  constexpr int kMany = 8, kFew = sizeof(S) == 4 ? 4 : 2;
  constexpr int64_t kElements = Lanes<S>::kElements;
  const auto of_B = [&](const Strided& v) {
    const int64_t bytes = kElements * sizeof(T) < 16 ? 16 / kElements : sizeof(T);
    return whole_vectors(v.data, bytes, {v.batch, v.head});
  };
  const bool vectors = p.N % kElements == 0 && of_B(p.B) && of_B(p.C) &&
                       whole_vectors(p.state, sizeof(S), {p.state_batch, p.state_head, p.state_row, p.N});
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t rows = p.batch * p.H * p.P;
  constexpr int64_t kBlockRows = kStepWarps * kMany * Lanes<S>::kRowsOfWarp;
  rows < 8 * processors* kBlockRows ? run_step<T, S, kFew>(p, processors, vectors, stream)
                                    : run_step<T, S, kMany>(p, processors, vectors, stream);
}

}  // namespace

void ssd_step(const SsdStep& p, Executor stream) {
  if (p.batch * p.H * p.P == 0) return;
  dispatch_float(p.dtype, [&](auto t) {
    dispatch_float(p.state_dtype, [&](auto s) { run_step<decltype(t), decltype(s)>(p, stream); });
  });
}

}  // namespace bitkernels::cuda
