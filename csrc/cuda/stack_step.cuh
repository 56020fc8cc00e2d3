// A token's step through all layers in one kernel, whose blocks stay on their processors and hand each other what a
// layer's parts leave: one launch instead of three a layer, weights and states on their way long before their turn.
//
// A block owns the same channels in every layer: octets (eight neighbours) of the inner channels, whose rows of z and x
// in the input projection, whose states and whose outputs it makes, and octets of the output projection's rows, whose
// residual it keeps. What all blocks need of all others passes through global memory: the residual as activations of
// the input projection, then B, C and the step's sizes, then the gated outputs as activations of the output projection.
//
// Exchange. Every place is written once a token, and holds kUnwritten before, which no value is: who waits for a value
// reads until it is there. There are no flags, so no order between writes is needed, and a hand-over takes as long as
// one write and one read of L2.
//
// A projection is a product of bits, as in fused.cuh. A warp has a slice of K: it waits for these activations, makes
// them fixed point in steps of its own and takes them apart into planes, and multiplies them with the slice's weights
// of all rows of the block. RMSNorm's weight and alpha are one scale, which who makes an activation applies; the norm's
// divisor is a factor of the sums.
#pragma once

#include <cfloat>

#include "bit_planes.cuh"
#include "hopper.cuh"
#include "mamba2_stack_step_hopper.h"
#include "ptx.cuh"
#include "reduce.cuh"
#include "step.cuh"
#include "tokens.cuh"

namespace bitkernels::cuda {

constexpr int kStackWarps = 20;
constexpr int kStackThreads = 32 * kStackWarps;
constexpr int kStackSlice = 256;  // of K, a warp's
constexpr int kMostStackWidth = kStackSlice * kStackWarps;
constexpr int kMostStackStages = 3;
constexpr int kStackTaps = 4;
constexpr int kInParams = 2 + 2 * kStackTaps - 1;  // bias; bias, taps and earlier inputs of the convolution
constexpr int kStepParams = 4;                     // D; norm, alpha and beta of the output
constexpr int kOutParams = 4;                      // norm, alpha and beta of the layer's input; bias of the output
constexpr uint32_t kUnwritten = 0xffffffff;

// Activations on their way to a projection, of every layer: an octet of scaled values as bf16, and sums over it of
// squares and of shifted values.
struct StackExchange {
  uint4* values;  // [layer][octet]
  float2* sums;   // [layer][octet]
};

struct StackArgs {
  float* residual;  // [d_model]
  StackExchange in, out;
  float* common;  // [layer][common_pitch]: B, C, and the step's sizes as they leave the input projection
  const int64_t* state_indices;
  int64_t slots, conv_slot, conv_row, ssm_slot;  // strides
  int count;                                     // of layers
  int width, inner;                              // d_model, d_inner
  int heads, head_dim, state, groups, taps;
  int common_pitch;
  int stages;
  int in_rows, out_rows;       // of a block, at most
  float per_width, per_inner;  // 1 / width, 1 / inner
  float in_eps, out_eps;
  StackLayer layers[kMostStackLayers];
};

struct Share {
  int first, count;
};

// Of `items`, what block `block` has.
__host__ __device__ inline Share share_of(int items, int block, int blocks) {
  const int least = items / blocks, more = items % blocks;
  return {block * least + (block < more ? block : more), least + (block < more)};
}

// Octets of what is common: one after the other from the block on that has fewest of the `octets` shared out before.
__host__ __device__ inline Share later_share_of(int items, int octets, int block, int blocks) {
  const int first = (block - octets % blocks + blocks) % blocks;
  return {first, first < items ? (items - 1 - first) / blocks + 1 : 0};
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline bool written(uint32_t v) { return v != kUnwritten; }

__device__ inline uint4 load_exchanged(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ inline uint2 load_exchanged(const float2* p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ inline float load_exchanged(const float* p) {
  float v;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
__device__ inline void store_exchanged(void* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// By a thread: until a value is there.
__device__ inline void wait_for(const float* p) {
  while (!written(__float_as_uint(load_exchanged(p)))) {
  }
}

// d[16, 8] += popcount(a[16, 256] & b[256, 8]).
__device__ inline void mma_bits(int (&d)[4], uint2 low, uint2 high, uint2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(b.x), "r"(b.y));
}

// Reads shared memory where it stands: what can be read again need not keep a register.
template <typename T>
__device__ T kept(const T& v) {
  return *const_cast<const volatile T*>(&v);
}

// The lane, as news: addresses made of it are made again where they are used, instead of keeping registers.
__device__ inline int lane_again() {
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  return lane;
}

// Eight lanes, kStep apart, have an octet's values, the one of `row` being this lane's. By a whole warp.
template <int kStep>
__device__ void publish_octet(const StackExchange& to, int64_t octet, int row, bool stores, float scaled, float square,
                              float shifted) {
  const float next = __shfl_xor_sync(0xffffffff, scaled, kStep);
  square = add_lanes(square, kStep, 8 * kStep);
  shifted = add_lanes(shifted, kStep, 8 * kStep);
  if (!stores || row > 3 && row % 2) return;
  if (row % 2) {
    store_exchanged(reinterpret_cast<float*>(to.sums + octet) + row / 2, __float_as_uint(row == 1 ? square : shifted));
  } else {
    store_exchanged(reinterpret_cast<uint32_t*>(to.values + octet) + row / 2,
                    bits_of(from_float<bf16>(scaled)) | bits_of(from_float<bf16>(next)) << 16);
  }
}

// A slice of K times the block's rows: partial[row] is what the slice adds to it, but for the norm's divisor. By a
// warp; returns the sum of the slice's squares.
__device__ inline float multiply_slice(const uint4* values, const float2* sums, bool has_octet, uint32_t* planes,
                                       const uint8_t* weights, int pitch, int rows, SharedAddress arrived, int parity,
                                       float* partial) {
  const int lane = lane_again();
  float v[8] = {};
  float square = 0.0f, shifted = 0.0f;
  uint32_t most = 0;
  uint4 pairs;
  uint2 sum;
  bool ready;
  do {  // together, so that the warp stays one
    pairs = load_exchanged(values);
    sum = load_exchanged(sums);
    ready = written(pairs.x) && written(pairs.y) && written(pairs.z) && written(pairs.w) && written(sum.x) &&
            written(sum.y);
  } while (!__all_sync(0xffffffff, ready));
  if (has_octet) {
    const uint32_t pair[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(pair[i] << 16);
      v[2 * i + 1] = __uint_as_float(pair[i] & 0xffff0000u);
      // As integers, NaN is the largest of all.
      most = max(most, max(__float_as_uint(fabsf(v[2 * i])), __float_as_uint(fabsf(v[2 * i + 1]))));
    }
    square = __uint_as_float(sum.x), shifted = __uint_as_float(sum.y);
  }
  const float absmax = __uint_as_float(__reduce_max_sync(0xffffffff, most));
  const int exponent = step_exponent<15>(absmax);
  const float per_unit = power_of_two(-exponent);
  uint32_t fixed[8], plane[4];
  int fixed_sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    fixed[i] = to_fixed<SignF16, 1>(v[i], per_unit);
    fixed_sum += static_cast<int>(fixed[i] - kZeroOf<SignF16>);
  }
  to_planes(fixed, false, plane);
  __syncwarp();  // the planes of the projection before have been read
#pragma unroll
  for (int i = 0; i < 4; ++i) planes[(lane % 4 + 4 * i) * 8 + lane / 4] = plane[i];
  __syncwarp();
  fixed_sum = __reduce_add_sync(0xffffffff, fixed_sum);
  // Fixed point has no infinities: a slice that holds one, or NaN, gives NaN.
  const float unit = absmax <= FLT_MAX ? power_of_two(exponent) : NAN;
  // Lanes below 16 get squares, the others what is shifted.
  const float both = add_lanes(add_halves(square, shifted, 16), 1, 16);
  square = __shfl_sync(0xffffffff, both, 0), shifted = __shfl_sync(0xffffffff, both, 16);
  const float base = shifted - static_cast<float>(fixed_sum) * unit;

  // Lane 4 g + t: words 2 t and 2 t + 1 of planes g and g + 8, and of rows g and g + 8.
  const uint2 low_planes = reinterpret_cast<const uint2*>(planes)[lane];
  const uint2 high_planes = reinterpret_cast<const uint2*>(planes)[lane + 32];
  const int t = lane % 4;
  const int top = t == 3 ? -512 : 512;
  weights += lane / 4 * pitch + t * 8;
  partial += lane / 4 + 8 * t;
  if (rows > 0) barrier_wait(arrived, parity);
#pragma unroll 1
  for (int row = 0; row < rows; row += 32) {
    int sum[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int low[4] = {}, high[4] = {};
      if (row + 16 * i < rows) {
        const uint8_t* from = weights + (row + 16 * i) * pitch;
        const uint2 first = *reinterpret_cast<const uint2*>(from);
        const uint2 second = *reinterpret_cast<const uint2*>(from + 8 * pitch);
        mma_bits(low, first, second, low_planes);
        mma_bits(high, first, second, high_planes);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[2 * i + h] = (low[2 * h] + 2 * low[2 * h + 1] + 256 * high[2 * h] + top * high[2 * h + 1]) << 2 * t;
      }
    }
    const int own = add_halves(add_halves(sum[0], sum[2], 2), add_halves(sum[1], sum[3], 2), 1);
    if (row + 8 * t < rows) partial[row] = fmaf(static_cast<float>(2 * own), unit, base);
  }
  return square;
}

#endif

struct StackShared {
  alignas(16) uint32_t planes[kStackWarps][16 * 8];
  alignas(16) float squares[2][kStackWarps];  // of slices, of the two projections
  uint64_t arrived[3][kMostStackStages];      // input weights, states, output weights
  int in_row[kStackWarps][8];                 // of the input projection; negative for none
  int head[kStackWarps], group[kStackWarps];  // of a warp's channels
  int64_t slot;
  int first_inner, first_outer, first_later;  // octets of the block
};

__global__ void __launch_bounds__(kStackThreads, 1) stack_step_kernel(const __grid_constant__ StackArgs a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint4 dynamic[];
  __shared__ StackShared shared;
  const int blocks = gridDim.x, block = blockIdx.x;
  const int thread = threadIdx.x, lane = thread % 32, warp = uniform(thread / 32);
  const Share inner = share_of(a.inner / 8, block, blocks);
  const Share outer = share_of(a.width / 8, block, blocks);
  const int common_rows = 2 * a.groups * a.state + a.heads;
  const Share later = later_share_of(ceil_div(common_rows, 8), a.inner / 8, block, blocks);
  const int in_rows = 8 * (2 * inner.count + later.count), out_rows = 8 * outer.count;
  const int state_row_bytes = a.state * 4;
  const int states_at = a.in_rows * (a.width / 8);
  const int out_at = states_at + a.in_rows / 2 * state_row_bytes;
  const int stage_bytes = out_at + a.out_rows * (a.inner / 8);
  const int64_t slot = slot_of(a.state_indices, a.slots, 0);

  uint8_t* stages = reinterpret_cast<uint8_t*>(dynamic);
  StackLayer* layers = reinterpret_cast<StackLayer*>(stages + a.stages * stage_bytes);
  const int in_slices = ceil_div(a.width, kStackSlice), out_slices = ceil_div(a.inner, kStackSlice);
  float* in_partial = reinterpret_cast<float*>(layers + a.count);  // [slice][row]
  float* out_partial = in_partial + in_slices * a.in_rows;
  float* zx = out_partial + out_slices * a.out_rows;  // z, then x, of the block's channels
  float* params = zx + a.in_rows;                     // [layer's parity][parameter][row]
  const int params_of_layer = kInParams * a.in_rows + kStepParams * a.in_rows + kOutParams * a.out_rows;

  for (int i = thread; i < a.count * static_cast<int>(sizeof(StackLayer) / 8); i += kStackThreads) {
    reinterpret_cast<uint64_t*>(layers)[i] = reinterpret_cast<const uint64_t*>(a.layers)[i];
  }
  if (thread == 0) {
    shared.slot = slot;
    shared.first_inner = inner.first, shared.first_outer = outer.first, shared.first_later = later.first;
    for (int i = 0; i < 3; ++i) {
      for (int stage = 0; stage < a.stages; ++stage) barrier_init(shared_address(&shared.arrived[i][stage]), 1);
    }
    barrier_init_fence();
  }
  __syncthreads();

  // The row of the input projection that is the block's row `own`; negative for none.
  const auto in_row_of = [&](int own) {
    const int channels = 8 * inner.count;
    if (own < channels) return 8 * inner.first + own;
    if (own < 2 * channels) return a.inner + 8 * inner.first + own - channels;
    const int row = (later.first + (own - 2 * channels) / 8 * blocks) * 8 + own % 8;
    return own < in_rows && row < common_rows ? 2 * a.inner + row : -1;
  };
  const auto bring_in = [&](int layer, int stage) {
    if (layer >= a.count) return;
    const SharedAddress full = shared_address(&shared.arrived[0][stage]);
    const int row_bytes = a.width / 8, channels = 8 * inner.count;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(layers[layer].in_packed);
    const SharedAddress to = shared_address(stages + stage * stage_bytes);
    int rows = 2 * channels;
    for (int i = 0; i < later.count; ++i) rows += min(common_rows - 8 * (kept(shared.first_later) + i * blocks), 8);
    barrier_arrive_expecting(full, rows * row_bytes);
    if (channels > 0) {
      load_bytes(to, from + int64_t(8 * kept(shared.first_inner)) * row_bytes, channels * row_bytes, full);
      load_bytes(to + channels * row_bytes, from + int64_t(a.inner + 8 * kept(shared.first_inner)) * row_bytes,
                 channels * row_bytes, full);
    }
#pragma unroll 1
    for (int i = 0; i < later.count; ++i) {
      const int first = 8 * (kept(shared.first_later) + i * blocks);
      load_bytes(to + (2 * channels + 8 * i) * row_bytes, from + int64_t(2 * a.inner + first) * row_bytes,
                 min(common_rows - first, 8) * row_bytes, full);
    }
  };
  const auto bring_out = [&](int layer, int stage) {
    if (layer >= a.count || outer.count == 0) return;
    const SharedAddress full = shared_address(&shared.arrived[2][stage]);
    const int row_bytes = a.inner / 8;
    barrier_arrive_expecting(full, out_rows * row_bytes);
    load_bytes(
        shared_address(stages + stage * stage_bytes + out_at),
        reinterpret_cast<const uint8_t*>(layers[layer].out_packed) + int64_t(8 * kept(shared.first_outer)) * row_bytes,
        out_rows * row_bytes, full);
  };
  const auto bring_states = [&](int layer, int stage) {
    const int64_t slot = kept(shared.slot);
    if (layer >= a.count || slot < 0 || inner.count == 0) return;
    const SharedAddress full = shared_address(&shared.arrived[1][stage]);
    const int bytes = 8 * inner.count * state_row_bytes;
    barrier_arrive_expecting(full, bytes);
    load_bytes(shared_address(stages + stage * stage_bytes + states_at),
               layers[layer].ssm_state + slot * a.ssm_slot + int64_t(8 * kept(shared.first_inner)) * a.state, bytes,
               full);
  };
  const bool brings = thread == kStackThreads - 32;
  if (brings) {
#pragma unroll 1
    for (int i = 0; i < a.stages; ++i) bring_in(i, i), bring_states(i, i), bring_out(i, i);
  }

  // A warp has an octet of each: rows of the input projection, channels, rows of the output projection. Lanes 8 apart
  // share one of its rows.
  const bool has_out = warp < outer.count;
  const bool steps = warp < inner.count;
  const int sizes_at = 2 * a.groups * a.state;  // of the steps, in what is common; then the decays
  if (lane < 8) shared.in_row[warp][lane] = in_row_of(8 * warp + lane);
  if (lane == 0) {
    shared.head[warp] = 8 * (inner.first + warp) / a.head_dim;
    shared.group[warp] = shared.head[warp] / (a.heads / a.groups);
  }
  float residual = has_out ? a.residual[8 * (outer.first + warp) + lane % 8] : 0.0f;
  __syncthreads();

  // What a layer needs besides, on its way a layer before.
  const auto of_in = [&](int layer, int row) { return params + (layer & 1) * params_of_layer + 8 * warp + row; };
  const auto of_step = [&](int layer, int row) { return of_in(layer, row) + kInParams * a.in_rows; };
  const auto of_out = [&](int layer, int row) { return of_in(layer, row) + (kInParams + kStepParams) * a.in_rows; };
  const auto bring_params = [&](int layer) {
    const int row = lane_again();
    if (layer < a.count && row < 8) {
      const StackLayer& l = layers[layer];
      const int in_row = kept(shared.in_row[warp][row]), common = in_row - 2 * a.inner;
      const int64_t slot = kept(shared.slot);
      float *in_to = of_in(layer, row), *step_to = of_step(layer, row), *out_to = of_out(layer, row);
      const auto bring = [&](float* to, const float* from, int64_t i) {
        copy_or_zero<4>(shared_address(to), from ? from + i : a.residual, from != nullptr);
      };
      if (in_row >= 0) {
        bring(in_to, l.in_bias, in_row);
        if (in_row >= a.inner && common < sizes_at) {
          const int channel = in_row - a.inner;
          bring(in_to + a.in_rows, l.conv_bias, channel);
#pragma unroll
          for (int w = 0; w < kStackTaps; ++w) {
            if (w < a.taps) bring(in_to + (2 + w) * a.in_rows, l.conv_weight, channel * a.taps + w);
            if (w + 1 < a.taps) {
              bring(in_to + (2 + kStackTaps + w) * a.in_rows, slot < 0 ? nullptr : l.conv_state,
                    slot * a.conv_slot + w * a.conv_row + channel);
            }
          }
        } else if (common >= 0) {
          bring(in_to + a.in_rows, l.dt_bias, common - sizes_at);
          bring(in_to + 2 * a.in_rows, l.A, common - sizes_at);
        }
      }
      if (steps) {
        const int own_channel = 8 * (inner.first + warp);
        bring(step_to, l.D, kept(shared.head[warp]));
        bring(step_to + a.in_rows, l.out_norm, own_channel + row);
        bring(step_to + 2 * a.in_rows, l.out_alpha, own_channel + row);
        bring(step_to + 3 * a.in_rows, l.out_beta, own_channel + row);
      }
      if (has_out) {
        const int out_row = 8 * (outer.first + warp) + row;
        bring(out_to, l.in_norm, out_row);
        bring(out_to + a.out_rows, l.in_alpha, out_row);
        bring(out_to + 2 * a.out_rows, l.in_beta, out_row);
        bring(out_to + 3 * a.out_rows, l.out_bias, out_row);
      }
    }
    commit_copies();
  };
  // The product with the lane's row, of what slices left. By a warp.
  const auto product = [&](const float* partial, int pitch, int slices, int which, float per_width, float eps) {
    const int lane = lane_again(), quarter = lane / 8;
    partial += 8 * warp + lane % 8;
    float squares = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kStackWarps / 4; ++i) {
      const int slice = 4 * i + quarter;
      sum += slice < slices ? partial[slice * pitch] : 0.0f;
      const float4 v = reinterpret_cast<const float4*>(shared.squares[which])[i];
      squares += (v.x + v.y) + (v.z + v.w);
    }
    return add_lanes(sum, 8, 32) * rsqrtf(fmaf(squares, per_width, eps));
  };
  const int in_octets = a.width / 8, out_octets = a.inner / 8;

  bring_params(0);
  wait_for_copies<0>();
  __syncthreads();
  // The residual as activations of the layer's input projection.
  const auto publish_residual = [&](int layer) {
    const int lane = lane_again();
    const float* own = of_out(layer, lane % 8);
    const float scaled = residual * own[0];
    publish_octet<1>(a.in, layer * in_octets + outer.first + warp, lane % 8, lane < 8, scaled * own[a.out_rows],
                     residual * residual, scaled * own[2 * a.out_rows]);
  };
  if (has_out) publish_residual(0);
  int stage = 0, parity = 0;
#pragma unroll 1
  for (int layer = 0; layer < a.count; ++layer) {
    bring_params(layer + 1);
    uint8_t* held = stages + stage * stage_bytes;
    float* common_now = a.common + layer * a.common_pitch;
    float square = 0.0f;
    if (brings && layer > 0) {
      // While all compute: what travels must not meet what is exchanged.
      wait_for(&a.in.sums[layer * in_octets].x);
      const int before = stage == 0 ? a.stages - 1 : stage - 1;
      bring_states(layer - 1 + a.stages, before);
      bring_out(layer - 1 + a.stages, before);
    }
    if (warp < in_slices) {
      const int octet = layer * in_octets + min(thread, in_octets - 1);
      square = multiply_slice(a.in.values + octet, a.in.sums + octet, thread < in_octets, shared.planes[warp],
                              held + warp * 32, in_octets, in_rows, shared_address(&shared.arrived[0][stage]), parity,
                              in_partial + warp * a.in_rows);
    }
    if (lane == 0) shared.squares[0][warp] = square;
    __syncthreads();
    if (8 * warp < in_rows) {
      __syncwarp();
      const int lane = lane_again(), row = lane % 8;
      const float* own = of_in(layer, row);
      float y = product(in_partial, a.in_rows, in_slices, 0, a.per_width, a.in_eps) + own[0];
      y = to_float(from_float<bf16>(y));
      float decay = 0.0f;
      const int in_row = kept(shared.in_row[warp][row]), common = in_row - 2 * a.inner;
      if (in_row >= a.inner && common < sizes_at) {
        float sum = own[a.in_rows];
        const int64_t slot = kept(shared.slot);
        float* state = layers[layer].conv_state + slot * a.conv_slot + in_row - a.inner;
#pragma unroll
        for (int w = 0; w < kStackTaps; ++w) {
          if (w >= a.taps) break;
          const float input = w + 1 < a.taps ? own[(2 + kStackTaps + w) * a.in_rows] : y;
          sum = fmaf(input, own[(2 + w) * a.in_rows], sum);
          if (w > 0 && slot >= 0 && lane < 8) state[(w - 1) * a.conv_row] = input;
        }
        y = to_float(from_float<bf16>(silu(sum)));
      } else if (common >= 0) {
        y += own[a.in_rows];
        y = fmaxf(y, 0.0f) + log1pf(expf(-fabsf(y)));
        decay = expf(y * own[2 * a.in_rows]);
      }
      if (common < 0) {
        zx[8 * warp + row] = y;
      } else if (lane < 8) {
        store_exchanged(common_now + common, __float_as_uint(y));
        if (common >= sizes_at) store_exchanged(common_now + common + a.heads, __float_as_uint(decay));
      }
    }
    __syncthreads();
    if (steps) {
      const int lane = lane_again();
      float4 h[8] = {};
      const int64_t slot = kept(shared.slot);
      const int head = kept(shared.head[warp]), group = kept(shared.group[warp]);
      const bool has_state = 4 * lane < a.state;
      if (slot >= 0) {
        barrier_wait(shared_address(&shared.arrived[1][stage]), parity);
        const float4* rows = reinterpret_cast<const float4*>(held + states_at + warp * 8 * state_row_bytes) + lane;
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          if (has_state) h[r] = rows[r * (a.state / 4)];
        }
      }
      const float* x = zx + 8 * (inner.count + warp);
      const int r4 = lane / 4;
      const float gate = silu(zx[8 * warp + r4]);
      const float* own_params = of_step(layer, r4);
      const float plain = own_params[0] * x[r4];
      const float norm = own_params[a.in_rows];
      const float scale = norm * own_params[2 * a.in_rows], shift = norm * own_params[3 * a.in_rows];
      const int n = has_state ? 4 * lane : 0;
      const uint4* B_at = reinterpret_cast<const uint4*>(common_now + group * a.state + n);
      const uint4* C_at = reinterpret_cast<const uint4*>(common_now + (a.groups + group) * a.state + n);
      uint4 b, c;
      float dt, decay;
      bool ready;
      do {
        b = load_exchanged(B_at), c = load_exchanged(C_at);
        dt = load_exchanged(common_now + sizes_at + head);
        decay = load_exchanged(common_now + sizes_at + a.heads + head);
        ready = written(b.x) && written(b.y) && written(b.z) && written(b.w) && written(c.x) && written(c.y) &&
                written(c.z) && written(c.w) && written(__float_as_uint(dt)) && written(__float_as_uint(decay));
      } while (!__all_sync(0xffffffff, ready));
      const float B[4] = {__uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z), __uint_as_float(b.w)};
      const float C[4] = {has_state ? __uint_as_float(c.x) : 0.0f, has_state ? __uint_as_float(c.y) : 0.0f,
                          has_state ? __uint_as_float(c.z) : 0.0f, has_state ? __uint_as_float(c.w) : 0.0f};
      float sums[8];
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const float scaled = dt * x[r];
        h[r].x = fmaf(scaled, B[0], decay * h[r].x);
        h[r].y = fmaf(scaled, B[1], decay * h[r].y);
        h[r].z = fmaf(scaled, B[2], decay * h[r].z);
        h[r].w = fmaf(scaled, B[3], decay * h[r].w);
        sums[r] = fmaf(h[r].x, C[0], fmaf(h[r].y, C[1], fmaf(h[r].z, C[2], h[r].w * C[3])));
      }
      float out = add_halves(add_halves(add_halves(sums[0], sums[4], 16), add_halves(sums[2], sums[6], 16), 8),
                             add_halves(add_halves(sums[1], sums[5], 16), add_halves(sums[3], sums[7], 16), 8), 4);
      out = add_lanes(out, 1, 4);
      out = slot < 0 ? 0.0f : (out + plain) * gate;  // padding has no output
      publish_octet<4>(a.out, layer * out_octets + inner.first + warp, r4, lane % 4 == 0, out * scale, out * out,
                       out * shift);
      if (slot >= 0 && has_state) {
        float* to =
            layers[layer].ssm_state + slot * a.ssm_slot + int64_t(8 * (inner.first + warp)) * a.state + 4 * lane;
#pragma unroll
        for (int r = 0; r < 8; ++r) *reinterpret_cast<float4*>(to + r * a.state) = h[r];
      }
    }
    if (brings) {
      wait_for(common_now + sizes_at);
      bring_in(layer + a.stages, stage);
    }
    __syncthreads();
    square = 0.0f;
    if (warp < out_slices) {
      const int octet = layer * out_octets + min(thread, out_octets - 1);
      square = multiply_slice(a.out.values + octet, a.out.sums + octet, thread < out_octets, shared.planes[warp],
                              held + out_at + warp * 32, out_octets, out_rows,
                              shared_address(&shared.arrived[2][stage]), parity, out_partial + warp * a.out_rows);
    }
    if (lane == 0) shared.squares[1][warp] = square;
    wait_for_copies<0>();
    __syncthreads();
    if (has_out) {
      __syncwarp();
      residual += product(out_partial, a.out_rows, out_slices, 1, a.per_inner, a.out_eps) +
                  of_out(layer, lane % 8)[3 * a.out_rows];
      if (layer + 1 < a.count) publish_residual(layer + 1);
    }
    if (++stage == a.stages) stage = 0, parity ^= 1;
  }
  if (has_out && lane < 8) a.residual[8 * (outer.first + warp) + lane] = residual;
#endif
}

}  // namespace bitkernels::cuda
