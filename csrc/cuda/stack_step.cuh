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
// One warp more fetches: it starts all copies, and reads B, C and the step's sizes for the block. The others wait for
// activations themselves, and rest where reading could only be in vain: it delays what is published.
//
// A projection is a product of bits, as in fused.cuh. A warp has a slice of K: it waits for these activations, makes
// them fixed point in steps of its own and takes them apart into planes, and multiplies them with the slice's weights
// of all rows of the block. RMSNorm's weight and alpha are one scale, which who makes an activation applies; the norm's
// divisor is a factor of the sums.
#pragma once

#include <cfloat>
#include <cstddef>

#include "bit_planes.cuh"
#include "hopper.cuh"
#include "mamba2_stack_step_hopper.h"
#include "ptx.cuh"
#include "reduce.cuh"
#include "stack_exchange.cuh"
#include "step.cuh"
#include "tokens.cuh"

namespace bitkernels::cuda {

constexpr int kStackWarps = 20;  // that compute; one more fetches
constexpr int kStackThreads = 32 * (kStackWarps + 1);
constexpr int kStackSlice = 256;  // of K, a warp's
constexpr int kMostStackWidth = kStackSlice * kStackWarps;
constexpr int kMostStackStages = 3;
constexpr int kRestNanoseconds = 500;  // of warps without a part in the residual, about as long as it takes
constexpr int kStackTaps = 4;
constexpr int kInParams = 2 + 2 * kStackTaps - 1;  // bias; bias, taps and earlier inputs of the convolution
constexpr int kStepParams = 4;                     // D; norm, alpha and beta of the output
constexpr int kOutParams = 4;                      // norm, alpha and beta of the layer's input; bias of the output

// Activations on their way to a projection, of every layer: an octet of scaled values as bf16, and sums over it of
// squares and of shifted values.
struct StackExchange {
  uint4* values;  // [layer][octet]
  float2* sums;   // [layer][octet]
};

struct StackArgs {
  float* residual;  // [d_model]
  StackExchange in, out;
  float* common;  // [layer][common_pitch]: B and C, then the steps of the heads, each with its decay
  const int64_t* state_indices;
  int64_t slots, conv_slot, conv_row, ssm_slot;  // strides
  int count;                                     // of layers
  int width, inner;                              // d_model, d_inner
  int heads, head_dim, state, groups, taps;
  int common_pitch;
  int stages;
  int in_rows, out_rows, block_groups;  // of a block, at most
  float per_width, per_inner;           // 1 / width, 1 / inner
  float in_eps, out_eps;
  StackLayer layers[kMostStackLayers];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// d[16, 8] += popcount(a[16, 256] & b[256, 8]).
__device__ inline void mma_bits(int (&d)[4], uint2 low, uint2 high, uint2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(b.x), "r"(b.y));
}

// Two neighbours' activations, the even one's in this lane and the odd one's kStep lanes on. By a whole warp.
template <int kStep>
__device__ void publish_pair(const StackExchange& to, int64_t pair, bool stores, float scaled) {
  const float next = __shfl_xor_sync(0xffffffff, scaled, kStep);
  if (!stores) return;
  store_exchanged(reinterpret_cast<uint32_t*>(to.values) + pair,
                  bits_of(from_float<bf16>(scaled)) | bits_of(from_float<bf16>(next)) << 16);
}

// Lanes below 8 have an octet's values, and the others the same. By a whole warp. Values go first: the sums take
// longer.
__device__ inline void publish_octet(const StackExchange& to, int64_t octet, float scaled, float square,
                                     float shifted) {
  const int lane = lane_again();
  publish_pair<1>(to, 4 * octet + lane % 8 / 2, lane < 8 && lane % 2 == 0, scaled);
  const float sum = add_lanes(add_halves(square, shifted, 4), 1, 4);  // squares in lanes 0 to 3, the other in 4 to 7
  if (lane < 8 && lane % 4 == 0) {
    store_exchanged(reinterpret_cast<float*>(to.sums + octet) + lane / 4, __float_as_uint(sum));
  }
}

// A slice of K times the block's rows: partial[row] is what the slice adds to it, but for the norm's divisor. By a
// warp; returns the sum of the slice's squares. Not inlined: both projections then fetch the same instructions.
__device__ __noinline__ float multiply_slice(const uint4* values, const float2* sums, bool has_octet, uint32_t* planes,
                                             const uint8_t* weights, int pitch, int rows, SharedAddress arrived,
                                             int parity, float* partial) {
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
    ready = written(pairs) && written(sum);
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
  float2 sums[4 * kStackWarps];               // of squares and of what is shifted, what a channel of the block adds
  float2 steps[kStackWarps / 2];              // of the block's heads, the step and its decay
  uint64_t arrived[3][kMostStackStages];      // input weights, states, output weights
  int in_row[kStackWarps + 1][8];             // of the input projection; negative for none
  int head[kStackWarps], group[kStackWarps];  // of an octet's channels, counted from the block's first
  int64_t slot;
  int first_inner, first_outer, first_later;  // octets of the block
};

// Where a parameter of the block's row is: the place of its array in StackLayer, and the element's times kSources.
constexpr int kSources = 32;
static_assert(sizeof(StackLayer) % 8 == 0 && sizeof(StackLayer) / 8 < kSources);
constexpr int64_t kNoSource = -1;  // not needed
constexpr int64_t kZeroSource = kSources - 1;

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
  const int sizes_at = 2 * a.groups * a.state;  // of the steps, in what is common
  const int state_row_bytes = a.state * 4;
  const int states_at = a.in_rows * (a.width / 8);
  const int out_at = states_at + a.in_rows / 2 * state_row_bytes;
  const int stage_bytes = out_at + a.out_rows * (a.inner / 8);
  const int64_t slot = slot_of(a.state_indices, a.slots, 0);

  uint8_t* stages = reinterpret_cast<uint8_t*>(dynamic);
  float* common_held = reinterpret_cast<float*>(stages + a.stages * stage_bytes);  // [group of the block][B, C]
  StackLayer* layers = reinterpret_cast<StackLayer*>(common_held + a.block_groups * 2 * a.state);
  const int step_params_at = kInParams * a.in_rows, out_params_at = step_params_at + kStepParams * a.in_rows;
  const int params_of_layer = out_params_at + kOutParams * a.out_rows;
  int64_t* sources = reinterpret_cast<int64_t*>(layers + a.count);  // of a layer's parameters
  const int in_slices = ceil_div(a.width, kStackSlice), out_slices = ceil_div(a.inner, kStackSlice);
  float* in_partial = reinterpret_cast<float*>(sources + params_of_layer);  // [slice][row]
  float* out_partial = in_partial + in_slices * a.in_rows;
  float* zx = out_partial + out_slices * a.out_rows;  // gates, then x, of the block's channels
  float* params = zx + a.in_rows;                     // [layer's parity][parameter][row]

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
  // The last warp starts copies and fetches what is of all blocks and for all warps.
  const bool fetches = warp == kStackWarps;
  if (fetches && lane == 0) {
#pragma unroll 1
    for (int i = 0; i < a.stages; ++i) bring_in(i, i), bring_states(i, i), bring_out(i, i);
  }

  // A warp has an octet of each: rows of the input projection and rows of the output projection. Lanes 8 apart share
  // one of its rows. Four warps have an octet of channels, each of them two.
  const bool has_out = warp < outer.count;
  const int first_head = 8 * inner.first / a.head_dim, first_group = first_head / (a.heads / a.groups);
  if (lane < 8) shared.in_row[warp][lane] = in_row_of(8 * warp + lane);
  if (lane == 0 && warp < inner.count) {
    const int head = 8 * (inner.first + warp) / a.head_dim;
    shared.head[warp] = head - first_head;
    shared.group[warp] = head / (a.heads / a.groups) - first_group;
  }
  float residual = has_out ? a.residual[8 * (outer.first + warp) + lane % 8] : 0.0f;

  const auto source_of = [&](int i) {
    const auto source = [](size_t place, int64_t element) {
      return element * kSources + static_cast<int64_t>(place / sizeof(const float*));
    };
    if (i < step_params_at) {
      const int p = i / a.in_rows, in_row = in_row_of(i % a.in_rows), channel = in_row - a.inner;
      if (in_row < 0) return kNoSource;
      if (p == 0) return source(offsetof(StackLayer, in_bias), in_row);
      if (channel >= a.inner + sizes_at) {
        if (p == 1) return source(offsetof(StackLayer, dt_bias), channel - a.inner - sizes_at);
        return p == 2 ? source(offsetof(StackLayer, A), channel - a.inner - sizes_at) : kNoSource;
      }
      if (channel < 0) return kNoSource;
      if (p == 1) return source(offsetof(StackLayer, conv_bias), channel);
      const int weight = p - 2, input = weight - kStackTaps;
      if (input >= a.taps - 1 || weight >= a.taps && input < 0) return kNoSource;
      if (input < 0) return source(offsetof(StackLayer, conv_weight), channel * a.taps + weight);
      if (slot < 0) return kZeroSource;
      return source(offsetof(StackLayer, conv_state), slot * a.conv_slot + input * a.conv_row + channel);
    }
    if (i < out_params_at) {
      const int p = (i - step_params_at) / a.in_rows, own = (i - step_params_at) % a.in_rows;
      if (own >= 8 * inner.count) return kNoSource;
      const int channel = 8 * inner.first + own;
      if (p == 0) return source(offsetof(StackLayer, D), channel / a.head_dim);
      return source(p == 1   ? offsetof(StackLayer, out_norm)
                    : p == 2 ? offsetof(StackLayer, out_alpha)
                             : offsetof(StackLayer, out_beta),
                    channel);
    }
    const int p = (i - out_params_at) / a.out_rows, own = (i - out_params_at) % a.out_rows;
    if (own >= out_rows) return kNoSource;
    return source(p == 0   ? offsetof(StackLayer, in_norm)
                  : p == 1 ? offsetof(StackLayer, in_alpha)
                  : p == 2 ? offsetof(StackLayer, in_beta)
                           : offsetof(StackLayer, out_bias),
                  8 * outer.first + own);
  };
  for (int i = thread; i < params_of_layer; i += kStackThreads) sources[i] = source_of(i);
  __syncthreads();

  // What a layer needs besides, on its way a layer before. By the warps that compute.
  const auto params_of = [&](int layer) { return params + (layer & 1) * params_of_layer; };
  const auto bring_params = [&](int layer) {
    if (layer < a.count && warp < kStackWarps) {
      const float* const* arrays = reinterpret_cast<const float* const*>(layers + layer);
#pragma unroll 1
      for (int i = threadIdx.x; i < params_of_layer; i += 32 * kStackWarps) {
        const int64_t source = sources[i];
        if (source == kNoSource) continue;
        const float* from = source == kZeroSource ? nullptr : arrays[source % kSources];
        copy_or_zero<4>(shared_address(params_of(layer) + i), from ? from + source / kSources : a.residual,
                        from != nullptr);
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
    const float* own = params_of(layer) + out_params_at + 8 * warp + lane % 8;
    const float scaled = residual * own[0];
    publish_octet(a.in, layer * in_octets + outer.first + warp, scaled * own[a.out_rows], residual * residual,
                  scaled * own[2 * a.out_rows]);
  };
  if (has_out) publish_residual(0);
  int stage = 0, parity = 0;
#pragma unroll 1
  for (int layer = 0; layer < a.count; ++layer) {
    if (layer + 1 == a.count) let_next_kernel_start();
    uint8_t* held = stages + stage * stage_bytes;
    float* common_now = a.common + layer * a.common_pitch;
    if (fetches) {
      if (lane == 0 && layer > 0) {
        // While all compute: what travels must not meet what is exchanged.
        wait_for(&a.in.sums[layer * in_octets].x);
        const int before = stage == 0 ? a.stages - 1 : stage - 1;
        bring_states(layer - 1 + a.stages, before);
        bring_out(layer - 1 + a.stages, before);
      }
      __syncwarp();
    } else {
      const int lane = lane_again();
      if (8 * warp < in_rows && lane < 8) {
        // The convolution but for its last input.
        float* own = params_of(layer) + 8 * warp + lane;
        const int channel = kept(shared.in_row[warp][lane]) - a.inner;
        if (channel >= 0 && channel < a.inner + sizes_at) {
          const int64_t slot = kept(shared.slot);
          float* state = layers[layer].conv_state + slot * a.conv_slot + channel;
          float sum = own[a.in_rows];
#pragma unroll
          for (int w = 0; w + 1 < kStackTaps; ++w) {
            if (w + 1 >= a.taps) break;
            const float input = own[(2 + kStackTaps + w) * a.in_rows];
            sum = fmaf(input, own[(2 + w) * a.in_rows], sum);
            if (w > 0 && slot >= 0) state[(w - 1) * a.conv_row] = input;
          }
          own[a.in_rows] = sum;
        }
      }
      __syncwarp();
      float square = 0.0f;
      if (warp < in_slices) {
        const int octet = 32 * warp + lane, at = layer * in_octets + min(octet, in_octets - 1);
        square = multiply_slice(a.in.values + at, a.in.sums + at, octet < in_octets, shared.planes[warp],
                                held + warp * 32, in_octets, in_rows, shared_address(&shared.arrived[0][stage]), parity,
                                in_partial + warp * a.in_rows);
      }
      if (lane == 0) shared.squares[0][warp] = square;
    }
    __syncthreads();
    if (fetches) {
      if (inner.count > 0) {
        const int lane = lane_again(), n = min(4 * lane, a.state - 4), last = inner.count - 1;
        const float2* step_at = reinterpret_cast<const float2*>(common_now + sizes_at) + first_head;
        const int step = min(lane, kept(shared.head[last]));
#pragma unroll 1
        for (int group = 0; group <= kept(shared.group[last]); ++group) {
          const float* B_at = common_now + (first_group + group) * a.state + n;
          uint4 b, c;
          uint2 size;
          do {
            b = load_exchanged(reinterpret_cast<const uint4*>(B_at));
            c = load_exchanged(reinterpret_cast<const uint4*>(B_at + a.groups * a.state));
            size = load_exchanged(step_at + step);
          } while (!__all_sync(0xffffffff, written(b) && written(c) && written(size)));
          float* B_to = common_held + group * 2 * a.state + n;
          *reinterpret_cast<uint4*>(B_to) = b;
          *reinterpret_cast<uint4*>(B_to + a.state) = c;
          shared.steps[step] = {__uint_as_float(size.x), __uint_as_float(size.y)};
        }
      }
    } else {
      if (8 * warp < in_rows) {
        __syncwarp();
        const int lane = lane_again(), row = lane % 8;
        const float* own = params_of(layer) + 8 * warp + row;
        const float sum = product(in_partial, a.in_rows, in_slices, 0, a.per_width, a.in_eps) + own[0];
        const float input = to_float(from_float<bf16>(sum));
        const int in_row = kept(shared.in_row[warp][row]), common = in_row - 2 * a.inner;
        const bool convolved = in_row >= a.inner && common < sizes_at;
        float y;
        if (common >= sizes_at) {
          const float v = input + own[a.in_rows];
          y = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
          const float decay = expf(y * own[2 * a.in_rows]);
          if (lane < 8) {
            store_exchanged(reinterpret_cast<float2*>(common_now + sizes_at) + common - sizes_at, y, decay);
          }
        } else {
          y = silu(convolved ? fmaf(input, own[(1 + a.taps) * a.in_rows], own[a.in_rows]) : input);
          if (convolved) y = to_float(from_float<bf16>(y));
          if (common < 0) {
            zx[8 * warp + row] = y;
          } else if (lane < 8) {
            store_exchanged(common_now + common, __float_as_uint(y));
          }
        }
        const int64_t slot = kept(shared.slot);
        if (convolved && a.taps > 1 && slot >= 0 && lane < 8) {
          layers[layer].conv_state[slot * a.conv_slot + (a.taps - 2) * a.conv_row + in_row - a.inner] = input;
        }
      }
      bring_params(layer + 1);
      if (kept(shared.slot) >= 0 && inner.count > 0) {
        barrier_wait(shared_address(&shared.arrived[1][stage]), parity);
      }
    }
    __syncthreads();
    if (!fetches) {
      const int lane = lane_again(), n = 4 * (lane % 16);
      const int64_t slot = kept(shared.slot);
#pragma unroll 1
      for (int octet = warp / 4; octet < inner.count; octet += kStackWarps / 4) {
        const int row = 8 * octet + 2 * (warp % 4) + lane / 16;  // of the block's channels; its lanes have n and n + 64
        const float* B_at = common_held + kept(shared.group[octet]) * 2 * a.state + n;
        const float* state = reinterpret_cast<const float*>(held + states_at + row * state_row_bytes) + n;
        const float2 size = shared.steps[kept(shared.head[octet])];
        const float* own = params_of(layer) + step_params_at + row;
        const float x = zx[8 * inner.count + row], scaled = size.x * x;
        float4 h[2] = {};
        float sums[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (n + 64 * i >= a.state) continue;
          const float4 B = *reinterpret_cast<const float4*>(B_at + 64 * i);
          const float4 C = *reinterpret_cast<const float4*>(B_at + a.state + 64 * i);
          if (slot >= 0) h[i] = *reinterpret_cast<const float4*>(state + 64 * i);
          h[i].x = fmaf(scaled, B.x, size.y * h[i].x);
          h[i].y = fmaf(scaled, B.y, size.y * h[i].y);
          h[i].z = fmaf(scaled, B.z, size.y * h[i].z);
          h[i].w = fmaf(scaled, B.w, size.y * h[i].w);
          sums[i] = fmaf(h[i].x, C.x, fmaf(h[i].y, C.y, fmaf(h[i].z, C.z, h[i].w * C.w)));
        }
        float out = add_lanes(sums[0] + sums[1], 1, 16);
        out = slot < 0 ? 0.0f : fmaf(own[0], x, out) * zx[row];  // padding has no output
        const float normed = out * own[a.in_rows];
        publish_pair<16>(a.out, 4 * (layer * out_octets + inner.first) + row / 2, lane == 0,
                         normed * own[2 * a.in_rows]);
        if (lane % 16 == 0) shared.sums[row] = {out * out, normed * own[3 * a.in_rows]};
        named_barrier(1 + warp / 4, 128);
        if (warp % 4 == 0 && lane < 2) {
          float sum = 0.0f;
#pragma unroll
          for (int i = 0; i < 8; ++i) sum += reinterpret_cast<const float*>(shared.sums + 8 * octet + i)[lane];
          store_exchanged(reinterpret_cast<float*>(a.out.sums + layer * out_octets + inner.first + octet) + lane,
                          __float_as_uint(sum));
        }
        if (slot >= 0) {
          float* to = layers[layer].ssm_state + slot * a.ssm_slot + int64_t(8 * inner.first + row) * a.state + n;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (n + 64 * i < a.state) *reinterpret_cast<float4*>(to + 64 * i) = h[i];
          }
        }
      }
    }
    __syncthreads();
    if (fetches) {
      if (lane == 0) {
        wait_for(&a.out.sums[layer * out_octets].x);
        bring_in(layer + a.stages, stage);
      }
      __syncwarp();
    } else {
      float square = 0.0f;
      if (warp < out_slices) {
        const int octet = 32 * warp + lane_again(), at = layer * out_octets + min(octet, out_octets - 1);
        square = multiply_slice(a.out.values + at, a.out.sums + at, octet < out_octets, shared.planes[warp],
                                held + out_at + warp * 32, out_octets, out_rows,
                                shared_address(&shared.arrived[2][stage]), parity, out_partial + warp * a.out_rows);
      }
      if (lane == 0) shared.squares[1][warp] = square;
    }
    wait_for_copies<0>();
    __syncthreads();
    if (has_out) {
      __syncwarp();
      residual += product(out_partial, a.out_rows, out_slices, 1, a.per_inner, a.out_eps) +
                  params_of(layer)[out_params_at + 3 * a.out_rows + 8 * warp + lane_again() % 8];
      if (layer + 1 < a.count) publish_residual(layer + 1);
    }
    // Reading in vain delays what the others publish.
    if (!has_out) __nanosleep(kRestNanoseconds);
    if (++stage == a.stages) stage = 0, parity ^= 1;
  }
  if (has_out && lane < 8) a.residual[8 * (outer.first + warp) + lane] = residual;
#endif
}

}  // namespace bitkernels::cuda
