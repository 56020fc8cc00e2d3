// The state's step inside the kernel of the projection that makes its inputs. While a block computes its part of the
// projection, the copy engine brings the states of its heads to shared memory; once all blocks have theirs, inputs are
// read, and the copy engine takes the states back. What a processor can take from L2 and give to it sets the time of
// this step, so half of it is spent beside the projection.
//
// A unit is 16 rows of a head, which a warp takes at once; a block has as many units, one after the other in memory.
#pragma once

#include "hopper.cuh"
#include "reduce.cuh"
#include "state_row.cuh"
#include "step.cuh"

namespace bitkernels::cuda {

constexpr int kHeldRows = 16;
constexpr int kHeldColumns = 128;  // of a row, in fp32
constexpr int kHeldRowBytes = kHeldColumns * 4;
constexpr int kHeldUnitBytes = kHeldRows * kHeldRowBytes;
constexpr int kMostHeldUnits = 32;  // of a block

struct HeldStates {
  SsdStep p;
  Divisor units_of_head, heads, heads_of_group;
  int units;   // of all blocks
  int placed;  // of a block, in places of their own; the others lie where weights were
};

// Dense fp32 states of 128 columns, inputs in whole vectors; without seeds, which 16 bits have alone.
inline bool can_be_held(const SsdStep& p) {
  const auto pairs = [](const Strided& v) {
    return reinterpret_cast<uintptr_t>(v.data) % 8 == 0 && v.batch % 4 == 0 && v.head % 4 == 0;
  };
  return p.state_dtype == DType::kFloat32 && p.dtype == DType::kBFloat16 && p.dt_dtype == p.dtype && p.z.data &&
         p.N == kHeldColumns && p.P % kHeldRows == 0 && p.state_row == p.N && p.state_head == p.P * p.N &&
         p.state_batch % 4 == 0 && reinterpret_cast<uintptr_t>(p.state) % 16 == 0 && pairs(p.B) && pairs(p.C);
}

inline int64_t held_units(const SsdStep& p) { return p.batch * p.H * (p.P / kHeldRows); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A block's units: first, first + 1, ...
struct HeldBlock {
  const HeldStates& of;
  SharedAddress placed, rest;  // places, of those that have none of their own in `rest`
  SharedAddress arrived;       // a barrier a unit
  int first, count;

  struct Unit {
    uint32_t head_of_batch, batch, head;
    int row;  // of the head, its first

    __device__ Unit(const HeldStates& of, uint32_t unit)
        : head_of_batch(of.units_of_head.quotient(unit)),
          batch(of.heads.quotient(head_of_batch)),
          head(head_of_batch - batch * of.heads.by),
          row(static_cast<int>(unit - head_of_batch * of.units_of_head.by) * kHeldRows) {}
  };

  __device__ HeldBlock(const HeldStates& states, SharedAddress own, SharedAddress weights, const uint64_t* barriers)
      : of(states), placed(own), rest(weights), arrived(shared_address(barriers)) {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int least = of.units / blocks, more = of.units - least * blocks;
    first = block * least + min(block, more);
    count = least + (block < more);
  }

  __device__ SharedAddress place(int u) const {
    return u < of.placed ? placed + u * kHeldUnitBytes : rest + (u - of.placed) * kHeldUnitBytes;
  }
  __device__ float* states(const Unit& at, int64_t slot) const {
    return static_cast<float*>(of.p.state) + slot * of.p.state_batch + at.head * of.p.state_head +
           at.row * kHeldColumns;
  }

  // By one thread.
  __device__ void ask(int u) const {
    const SsdStep& p = of.p;
    const Unit at(of, first + u);
    const int64_t slot = slot_of(p.state_indices, p.slots, at.batch);
    if (slot >= 0) {
      barrier_arrive_expecting(arrived + 8 * u, kHeldUnitBytes);
      load_bytes(place(u), states(at, slot), kHeldUnitBytes, arrived + 8 * u);
    }
    prefetch_to_l2(static_cast<const float*>(p.A) + at.head);
    if (p.dt_bias) prefetch_to_l2(static_cast<const float*>(p.dt_bias) + at.head);
    if (p.D) prefetch_to_l2(static_cast<const float*>(p.D) + (p.D_per_channel ? at.head * p.P + at.row : at.head));
  }

  // By a warp, once all blocks have their inputs.
  template <typename T>
  __device__ void step(int u) const {
    const SsdStep& p = of.p;
    const Unit at(of, first + u);
    const int lane = threadIdx.x % 32;
    // The row that this lane finishes, as another of bit 4 does.
    const int own = at.row + lane % 4 * 4 + lane / 16 * 2 + lane / 8 % 2;
    const bool stores = !(lane & 4);
    T* const y = static_cast<T*>(p.y) + int64_t(at.head_of_batch) * p.P + own;
    const int64_t slot = slot_of(p.state_indices, p.slots, at.batch);
    if (slot < 0) {
      if (stores) *y = from_float<T>(0.0f);
      return;
    }
    const auto view = [&](const Strided& v, uint32_t head) {
      return static_cast<const T*>(v.data) + at.batch * v.batch + head * v.head;
    };
    const uint32_t group = of.heads_of_group.quotient(at.head);
    const T raw_dt = *view(p.dt, at.head), raw_x = view(p.x, at.head)[own], raw_z = view(p.z, at.head)[own];
    Elements<T, 4> B, C;
    B.template load<true>(view(p.B, group) + lane * 4, 4);
    C.template load<true>(view(p.C, group) + lane * 4, 4);
    const float A = static_cast<const float*>(p.A)[at.head];
    const float bias = p.dt_bias ? static_cast<const float*>(p.dt_bias)[at.head] : 0.0f;
    const float D = p.D ? static_cast<const float*>(p.D)[p.D_per_channel ? at.head * p.P + own : at.head] : 0.0f;
    const float dt = step_size(p, to_float(raw_dt) + bias);
    const float decay = expf(dt * A), x = to_float(raw_x), scaled = dt * x;

    barrier_wait(arrived + 8 * u, 0);
    const SharedAddress rows = place(u) + lane * 16;
    float sum = 0.0f;
#pragma unroll 1
    for (int t = 0; t < kHeldRows / 4; ++t) {
      float of_row[4] = {};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const SharedAddress row = rows + (4 * t + r) * kHeldRowBytes;
        uint32_t words[4];
        load_words(row, words);
        const float scaled_row = __shfl_sync(0xffffffff, scaled, t | r / 2 << 4 | r % 2 << 3);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float next = fmaf(scaled_row, B[i], decay * __uint_as_float(words[i]));
          of_row[r] = fmaf(next, C[i], of_row[r]);
          words[i] = __float_as_uint(next);
        }
        store_words(row, words);
      }
      // In the order of ssd_step, so that the bits are the same.
      const float half = add_halves(add_halves(of_row[0], of_row[2], 16), add_halves(of_row[1], of_row[3], 16), 8);
      const float total = add_lanes(half, 1, 8);
      if (lane % 4 == t) sum = total;
    }
    copy_engine_fence();
    __syncwarp();
    if (lane == 0) {
      store_bytes(states(at, slot), place(u), kHeldUnitBytes);
      commit_stores();
    }
    if (stores) *y = from_float<T>(fmaf(D, x, sum) * silu(to_float(raw_z)));
  }
};

#endif

}  // namespace bitkernels::cuda
