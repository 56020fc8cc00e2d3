// The step of two to eight tokens through all layers in one kernel: as stack_step.cuh for one, but for what more tokens
// change.
//
// Their states are most of what a processor exchanges with memory. A ring in shared memory holds rounds of them, eight
// rows of each token; a warp of its own has the copy engine write back what has been computed and bring what comes next
// in its place, one copy after the other, as many at once take a sixth longer at 780M. They leave L2 first, and weights
// that were brought there ahead leave it last, until they are read.
//
// All blocks need all activations. Two blocks of a cluster share the rows of both, a half of K each, and send each
// other sums. Weights are operands of the tensor cores as +1 and -1 in bf16, which is what activations pass from block
// to block in. Each lane holds words of weights: word t of four belongs to lane t of a quad, whose activations are of
// the same columns, so that a word is read once and stays in a register until it is decoded. Activations lie in memory
// in the order of the lanes (fragment_of()).
//
// Two more warps fetch: they add up the squares and the shifted activations of all blocks beside the products, and ask
// for the next layer's weights to come to L2, half a layer ahead, when this one's are in registers.
#pragma once

#include "bit_planes.cuh"
#include "cluster.cuh"
#include "hopper.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "stack_exchange.cuh"
#include "stack_tokens_layout.cuh"
#include "stack_tokens_products.cuh"
#include "stack_tokens_states.cuh"
#include "step.cuh"

namespace bitkernels::cuda {

template <int kInTiles, int kOutTiles>
__global__ void __launch_bounds__(kTokenThreads, 1) stack_tokens_kernel(const __grid_constant__ StackTokensArgs a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) uint8_t dynamic_bytes[];
  __shared__ StackTokensShared shared;
  const int blocks = gridDim.x, block = blockIdx.x, rank = cluster_rank();
  const int thread = threadIdx.x, lane = thread % 32, warp = uniform(thread / 32);
  const int tokens = a.tokens;
  const Share inner = share_of(a.inner / 8, block, blocks);
  const Share outer = share_of(a.width / 8, block, blocks);
  const int in_units = a.width / (2 * kUnitK), out_units = a.inner / (2 * kUnitK);  // of a half of K
  const int out_sources = out_units < kTokenWarps ? out_units : kTokenWarps;        // warps with a part of it
  const int in_rows = 8 * a.in_octets, out_rows = 8 * a.out_octets, channels = 8 * a.inner_octets;
  const int first_head = 8 * inner.first / a.head_dim;

  uint8_t* states = dynamic_bytes;
  uint4* staged =
      reinterpret_cast<uint4*>(states + a.state_rounds * tokens * kStateUnitBytes);  // a half of the residual
  float* sums = reinterpret_cast<float*>(staged + in_units * kUnitK);  // [source][row of the cluster][token]
  float* in_received = sums + 2 * kStackTokens * max(a.slices * in_rows, out_sources * out_rows);  // [row][token]
  float* out_received = in_received + in_rows * kStackTokens;
  float* zx = out_received + out_rows * kStackTokens;  // [gates, then x][token]
  float* params = zx + 2 * channels * kStackTokens;    // [norm, alpha, beta, D][channel]
  StackLayer* layers = reinterpret_cast<StackLayer*>(params + 4 * channels);

  for (int i = thread; i < a.count * static_cast<int>(sizeof(StackLayer) / 8); i += kTokenThreads) {
    reinterpret_cast<uint64_t*>(layers)[i] = reinterpret_cast<const uint64_t*>(a.layers)[i];
  }
  if (thread < 2 * a.in_octets) {
    const int of = block - rank + thread / a.in_octets, octet = thread % a.in_octets;
    const Share own = share_of(a.inner / 8, of, blocks);
    const Share later = later_share_of((2 * kTokenState + a.heads) / 8, a.inner / 8, of, blocks);
    const int common = octet - 2 * a.inner_octets, x = octet - a.inner_octets;
    int row = -1;
    if (common >= 0) {
      if (common < later.count) row = 2 * a.inner + 8 * (later.first + common * blocks);
    } else if (x >= 0) {
      if (x < own.count) row = a.inner + 8 * (own.first + x);
    } else if (octet < own.count) {
      row = 8 * (own.first + octet);
    }
    shared.in_row[thread] = row;
  }
  if (thread < 2 * a.out_octets) {
    const Share own = share_of(a.width / 8, block - rank + thread / a.out_octets, blocks);
    const int octet = thread % a.out_octets;
    shared.out_row[thread] = octet < own.count ? 8 * (own.first + octet) : -1;
  }
  if (thread < inner.count) shared.head[thread] = 8 * (inner.first + thread) / a.head_dim - first_head;
  if (thread < tokens) shared.slot[thread] = slot_of(a.state_indices, a.slots, thread);
  const int in_bytes = in_rows * kStackTokens * 4, out_bytes = out_rows * kStackTokens * 4;
  if (thread == 0) {
    for (int i = 0; i < a.state_rounds * tokens; ++i) {
      barrier_init(shared_address(&shared.full[i]), 1);
      barrier_init(shared_address(&shared.done[i]), 2);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared_address(&shared.sent[i]), 1);
      barrier_init(shared_address(&shared.totals[i]), kFetchWarps);
    }
    barrier_init_fence();
    barrier_arrive_expecting(shared_address(&shared.sent[0]), in_bytes);
    barrier_arrive_expecting(shared_address(&shared.sent[1]), out_bytes);
  }
  __syncthreads();
  wait_for_cluster();

  const auto exchange_of = [&](int layer) { return a.exchange + int64_t(layer) * a.layer_bytes; };
  if (warp == kTokenWarps) {
    move_states(a, layers, shared, states, inner, lane);
  } else if (warp > kTokenWarps) {
    const int part = warp - kTokenWarps - 1;
    // A layer's weights and exchange come to L2, to stay there until they are read.
    const uint64_t kept = evict_last();
    const auto prefetch_layer = [&](int layer) {
      if (layer >= a.count || part > 0) return;
      if (lane < a.in_octets) {
        const int row = shared.in_row[rank * a.in_octets + lane], bytes = a.width / 8;
        if (row >= 0) {
          prefetch_to_l2(reinterpret_cast<const uint8_t*>(layers[layer].in_packed) + int64_t(row) * bytes, 8 * bytes,
                         kept);
        }
      } else if (lane - a.in_octets < a.out_octets) {
        const int row = shared.out_row[rank * a.out_octets + lane - a.in_octets], bytes = a.inner / 8;
        if (row >= 0) {
          prefetch_to_l2(reinterpret_cast<const uint8_t*>(layers[layer].out_packed) + int64_t(row) * bytes, 8 * bytes,
                         kept);
        }
      } else if (lane == 31) {
        const int share = (a.layer_bytes / 128 / blocks + 1) * 128, from = block * share;
        if (from < a.layer_bytes) prefetch_to_l2(exchange_of(layer) + from, min(share, a.layer_bytes - from), kept);
      }
    };
    // The sums of some of the blocks, two tokens a lane; the block's own are published before.
    const auto add_up = [&](int which, float2* of_block, float2 own) {
      if (part == 0 && lane < kStackTokens) store_exchanged(of_block + block * kStackTokens + lane, own.x, own.y);
      const Share share = share_of(blocks, part, kFetchWarps);
      const uint4* from = reinterpret_cast<const uint4*>(of_block + share.first * kStackTokens);
      const int vectors = share.count * kStackTokens / 2;
      float total[4] = {};
      constexpr int kTogether = 9;  // 66 blocks
#pragma unroll 1
      for (int first = lane; first - lane < vectors; first += kTogether * 32) {
        uint4 v[kTogether];
        bool ready;
        do {
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            v[j] = uint4{};
            if (first + 32 * j < vectors) v[j] = load_exchanged(from + first + 32 * j);
          }
          ready = all_written(v);
        } while (!__all_sync(0xffffffff, ready));
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          total[0] += __uint_as_float(v[j].x), total[1] += __uint_as_float(v[j].y);
          total[2] += __uint_as_float(v[j].z), total[3] += __uint_as_float(v[j].w);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] = add_lanes(total[i], 4, 32);
      if (lane < kStackTokens / 2) {
        shared.total[which][part][2 * lane] = {total[0], total[1]};
        shared.total[which][part][2 * lane + 1] = {total[2], total[3]};
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(&shared.totals[which]));
    };
    prefetch_layer(0);
#pragma unroll 1
    for (int i = 0; i < 2 * a.count; ++i) {
      const int layer = i / 2, which = i % 2;
      float2 own = {};
      if (which == 0) {
        named_barrier(2, 32 * (outer.count + kFetchWarps));
#pragma unroll 1
        for (int octet = 0; octet < outer.count; ++octet) {
          const float2 sum = shared.out_sums[octet][lane % kStackTokens];
          own.x += sum.x, own.y += sum.y;
        }
      } else {
        prefetch_layer(layer + 1);
        named_barrier(3, kTokenWorkers + 32 * kFetchWarps);
        const float2 first = shared.state_sums[lane % kStackTokens];
        const float2 second = shared.state_sums[lane % kStackTokens + kStackTokens];
        own = {first.x + second.x, first.y + second.y};
      }
      add_up(which, reinterpret_cast<float2*>(exchange_of(layer) + (which ? a.out_sums_at : a.in_sums_at)), own);
    }
  } else {
    const uint64_t once = evict_first();
    const int slice = warp / a.groups, group = warp % a.groups;
    const int first_unit = slice * kInUnits;
    const int units = slice < a.slices ? min(kInUnits, in_units - first_unit) : 0;
    const int first_tile = group * kInTiles;
    // Of an octet, and the first of two.
    const auto row_of_lane = [] { return lane_again() % 8; };
    const auto tokens_of_lane = [] { return lane_again() / 8 * 2; };
    const bool has_out = warp < outer.count;
    const int in_row = uniform(warp < a.in_octets ? shared.in_row[rank * a.in_octets + warp] : -1);
    const bool has_in = in_row >= 0;

    const auto load_in = [&](int layer, uint32_t (&in_weights)[kInUnits][kInTiles][2]) {
      const int lane = lane_again();
      const uint32_t* from = layers[layer].in_packed + (rank * in_units + first_unit) * 4 + lane % 4;
#pragma unroll
      for (int m = 0; m < kInTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int octet = 2 * (first_tile + m) + h;
          const int row = octet < 2 * a.in_octets ? shared.in_row[octet] : -1;
          const uint32_t* at = from + int64_t(row + lane / 4) * (a.width / 32);
#pragma unroll
          for (int u = 0; u < kInUnits; ++u) {
            in_weights[u][m][h] = 0;
            if (row >= 0 && u < units) in_weights[u][m][h] = load_weights(at + 4 * u, once);
          }
        }
      }
    };
    const auto load_out = [&](int layer, uint32_t (&out_weights)[kOutUnits][kOutTiles][2]) {
      const int lane = lane_again();
      const uint32_t* from = layers[layer].out_packed + (rank * out_units + warp) * 4 + lane % 4;
#pragma unroll
      for (int m = 0; m < kOutTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = m < a.out_octets ? shared.out_row[2 * m + h] : -1;
          const uint32_t* at = from + int64_t(row + lane / 4) * (a.inner / 32);
#pragma unroll
          for (int u = 0; u < kOutUnits; ++u) {
            out_weights[u][m][h] = 0;
            if (row >= 0 && warp + kTokenWarps * u < out_units) {
              out_weights[u][m][h] = load_weights(at + 4 * kTokenWarps * u, once);
            }
          }
        }
      }
    };
    // What a source has of a tile.
    const auto keep_tile = [&](const float (&c)[4], int tile, int octets, int source) {
      const int lane = lane_again();
      float* to = sums + ((source * 2 * octets + 2 * tile) * 8 + lane / 4) * kStackTokens + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = {c[0], c[1]};
      *reinterpret_cast<float2*>(to + 8 * kStackTokens) = {c[2], c[3]};
    };
    // Sums of all sources to the other block of the cluster, two of its octets a warp, a row's four tokens a lane.
    const auto send_sums = [&](int sources, int octets, float* received, int which) {
      const int lane = lane_again(), octet = 2 * (kTokenWarps - 1 - warp) + lane / 16;
      if (octet >= octets) return;
      const int at = (octet * 8 + lane % 8) * kStackTokens + lane / 8 % 2 * 4;
      const float4* from = reinterpret_cast<const float4*>(sums + (rank ^ 1) * octets * 8 * kStackTokens + at);
      float4 sum = {};
#pragma unroll 4
      for (int i = 0; i < sources; ++i) {
        const float4 v = from[i * octets * 4 * kStackTokens];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      const uint32_t bits[4] = {__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z),
                                __float_as_uint(sum.w)};
      send(reinterpret_cast<uint32_t*>(received + at), &shared.sent[which], rank ^ 1, 2, bits);
    };
    // The block's own of the lane's row and two tokens.
    const auto add_sources = [&](int sources, int octets, float (&y)[2]) {
      const float2* from = reinterpret_cast<const float2*>(
          sums + ((rank * octets + warp) * 8 + row_of_lane()) * kStackTokens + tokens_of_lane());
      y[0] = y[1] = 0.0f;
#pragma unroll 4
      for (int i = 0; i < sources; ++i) {
        const float2 v = from[i * octets * 8 * kStackTokens];
        y[0] += v.x, y[1] += v.y;
      }
    };
    // And the other block's, times 1 / rms.
    const auto receive = [&](const float* received, int which, float per, float eps, float (&y)[2]) {
      const int at = (warp * 8 + row_of_lane()) * kStackTokens + tokens_of_lane();
      const float2 other = *reinterpret_cast<const float2*>(received + at);
      y[0] = rank ? other.x + y[0] : y[0] + other.x;
      y[1] = rank ? other.y + y[1] : y[1] + other.y;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float squares = 0.0f, shifted = 0.0f;
#pragma unroll
        for (int i = 0; i < kFetchWarps; ++i) {
          const float2 total = shared.total[which][i][tokens_of_lane() + j];
          squares += total.x, shifted += total.y;
        }
        y[j] = (y[j] + shifted) * rsqrtf(fmaf(squares, per, eps));
      }
    };

    float residual[2] = {};
    float next_norm = 0.0f, next_alpha = 0.0f, next_beta = 0.0f;
    const auto out_row_of_lane = [&] { return 8 * (outer.first + warp) + row_of_lane(); };
    const auto load_next = [&](int layer) {
      if (!has_out || layer >= a.count) return;
      const int out_row = out_row_of_lane();
      next_norm = layers[layer].in_norm[out_row];
      next_alpha = layers[layer].in_alpha[out_row];
      next_beta = layers[layer].in_beta[out_row];
    };
    const auto publish_residual = [&](int layer) {
      uint8_t* to = exchange_of(layer);
      const uint32_t pair = pair_of_token(residual[0] * next_norm * next_alpha, residual[1] * next_norm * next_alpha);
      const int token = tokens_of_lane() + lane % 2;
      if (token < tokens) {
        store_exchanged(to + fragment_of(outer.first + warp, token) * 16 + row_of_lane() / 2 * 4, pair);
      }
      const float shift = next_norm * next_beta;
      // Over the rows: lanes of bits 4 and 2 have one of four sums each.
      const float squares = add_halves(residual[0] * residual[0], residual[1] * residual[1], 4);
      const float shifted = add_halves(residual[0] * shift, residual[1] * shift, 4);
      const float sum = add_lanes(add_halves(squares, shifted, 2), 1, 2);
      if (lane % 2 == 0) {
        const int of = tokens_of_lane() + (lane / 4 & 1);
        reinterpret_cast<float*>(&shared.out_sums[warp][of])[lane / 2 & 1] = sum;
      }
      __syncwarp();
      arrive_at_named_barrier(2, 32 * (outer.count + kFetchWarps));
    };
    // Of the state's step, on their way while the input projection runs.
    const auto bring_params = [&](const StackLayer& l) {
      const int lane = lane_again();
      if (warp < 4) {
        const float* from = warp == 0 ? l.out_norm : warp == 1 ? l.out_alpha : warp == 2 ? l.out_beta : l.D;
        float* to = params + warp * channels;
#pragma unroll 1
        for (int c = lane; c < 8 * inner.count; c += 32) {
          const int at = warp == 3 ? first_head + shared.head[c / 8] : 8 * inner.first + c;
          copy_or_zero<4>(shared_address(to + c), from ? from + at : a.residual, from != nullptr);
        }
        __syncwarp();
      }
      commit_copies();
    };

    if (has_out) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (tokens_of_lane() + j < tokens)
          residual[j] = a.residual[int64_t(tokens_of_lane() + j) * a.width + out_row_of_lane()];
      }
      __syncwarp();
      load_next(0);
    }
    int round = 0, round_parity = 0;  // of states
#pragma unroll 1
    for (int layer = 0; layer < a.count; ++layer) {
      const StackLayer& l = layers[layer];
      uint8_t* exchange = exchange_of(layer);
      if (has_out) publish_residual(layer);
      bring_params(l);
      const int lane = lane_again();
      float c[kInTiles][4] = {};
      if (units > 0) {
        uint32_t in_weights[kInUnits][kInTiles][2];
        load_in(layer, in_weights);
        const uint4* from = reinterpret_cast<const uint4*>(exchange) + (rank * in_units + first_unit) * kUnitK;
        uint4* to = staged + first_unit * kUnitK;
        const int stride = 32 * a.groups;
#pragma unroll 1
        for (int first = group * 32 + lane; first < units * kUnitK; first += 4 * stride) {
          uint4 v[4];
          bool ready;
          do {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int at = first + j * stride;
              v[j] = uint4{};
              if (at < units * kUnitK && at / 4 % kStackTokens < tokens) v[j] = load_exchanged(from + at);
            }
            ready = all_written(v);
          } while (!__all_sync(0xffffffff, ready));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (first + j * stride < units * kUnitK) to[first + j * stride] = v[j];
          }
        }
        named_barrier(4 + slice, stride);
#pragma unroll
        for (int u = 0; u < kInUnits; ++u) {
          if (u >= units) break;
          uint4 x[4];
#pragma unroll
          for (int o = 0; o < 4; ++o) x[o] = to[u * kUnitK + o * 32 + lane];
          multiply_unit(c, in_weights[u], x);
        }
      }
      // What the row needs besides. z; x, B and C, which are convolved; steps.
      const int n = in_row + row_of_lane(), channel = n - a.inner;
      const bool is_z = in_row < a.inner, is_step = in_row >= 2 * a.inner + 2 * kTokenState;
      const bool convolved = !is_z && !is_step;
      float bias = 0.0f, conv_bias = 0.0f, history[2][kTokenTaps - 1] = {};
      float4 taps = {};
      float* window[2] = {};
      if (has_in) {
        if (l.in_bias) bias = l.in_bias[n];
        if (convolved) {
          taps = reinterpret_cast<const float4*>(l.conv_weight)[channel];
          if (l.conv_bias) conv_bias = l.conv_bias[channel];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int64_t slot = tokens_of_lane() + j < tokens ? shared.slot[tokens_of_lane() + j] : -1;
            if (slot < 0) continue;
            window[j] = l.conv_state + slot * a.conv_slot + channel;
#pragma unroll
            for (int w = 0; w + 1 < kTokenTaps; ++w) history[j][w] = window[j][w * a.conv_row];
          }
        } else if (is_step) {
          if (l.dt_bias) conv_bias = l.dt_bias[channel - a.inner - 2 * kTokenState];
          taps.x = l.A[channel - a.inner - 2 * kTokenState];
        }
      }
      __syncwarp();
      named_barrier(1, kTokenWorkers);  // all have read what was kept before
      if (units > 0) {
#pragma unroll
        for (int m = 0; m < kInTiles; ++m) {
          if (first_tile + m < a.in_octets) keep_tile(c[m], first_tile + m, a.in_octets, slice);
        }
      }
      named_barrier(1, kTokenWorkers);
      send_sums(a.slices, a.in_octets, in_received, 0);
      __syncwarp();
      float y[2];
      if (has_in) add_sources(a.slices, a.in_octets, y);
      barrier_wait(shared_address(&shared.sent[0]), layer & 1);
      if (thread == 0) barrier_arrive_expecting(shared_address(&shared.sent[0]), in_bytes);
      if (has_in) {
        barrier_wait(shared_address(&shared.totals[0]), layer & 1);
        receive(in_received, 0, a.per_width, a.in_eps, y);
        float input[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          input[j] = to_float(from_float<bf16>(y[j] + bias));
          y[j] = input[j];
          if (convolved) {
            y[j] = fmaf(history[j][0], taps.x, conv_bias);
            y[j] = fmaf(history[j][1], taps.y, y[j]);
            y[j] = fmaf(history[j][2], taps.z, y[j]);
            y[j] = fmaf(input[j], taps.w, y[j]);
          }
          if (!is_step) y[j] = silu(y[j]);
          if (convolved) y[j] = to_float(from_float<bf16>(y[j]));
        }
        if (is_step) {
          float2* to = reinterpret_cast<float2*>(exchange + a.steps_at) + channel - a.inner - 2 * kTokenState;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float v = input[j] + conv_bias, step = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
            if (tokens_of_lane() + j < tokens) {
              store_exchanged(to + (tokens_of_lane() + j) * a.heads, step, expf(step * taps.x));
            }
          }
        } else if (in_row >= 2 * a.inner) {
          const uint32_t pair = pair_of_token(y[0], y[1]);
          const int token = tokens_of_lane() + lane % 2;
          if (token < tokens) {
            store_exchanged(exchange + a.common_at + (token * 2 * kTokenState + (channel - a.inner & ~1)) * 2, pair);
          }
        } else {
          // z lies at its octet, x behind all z.
          *reinterpret_cast<float2*>(zx + (8 * warp + row_of_lane()) * kStackTokens + tokens_of_lane()) = {y[0], y[1]};
        }
        if (convolved) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (!window[j]) continue;
            window[j][0] = history[j][1];
            window[j][a.conv_row] = history[j][2];
            window[j][2 * a.conv_row] = input[j];
          }
        }
        // The next layer's to L2.
        if (layer + 1 < a.count && convolved) {
          const StackLayer& next = layers[layer + 1];
          if (row_of_lane() == 0) {
            prefetch_to_l2(next.conv_weight + channel * kTokenTaps);
            if (next.conv_bias) prefetch_to_l2(next.conv_bias + channel);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              if (!window[j]) continue;
              for (int w = 0; w + 1 < kTokenTaps; ++w) {
                prefetch_to_l2(next.conv_state + (window[j] - l.conv_state) + w * a.conv_row);
              }
            }
          }
          __syncwarp();
        }
      }
      wait_for_copies<0>();
      named_barrier(1, kTokenWorkers);
      const int token = warp % kStackTokens, half = warp / kStackTokens;
      float square = 0.0f, shifted = 0.0f;
      if (token < tokens && inner.count > 0) {
        float of_octet[kMostInnerOctets] = {};  // of a row, lane / 8: what the lane has of it
        const float2* B_at = reinterpret_cast<const float2*>(exchange + a.common_at) + token * (kTokenState / 2) + lane;
        const float2* step_at = reinterpret_cast<const float2*>(exchange + a.steps_at) + token * a.heads + first_head +
                                min(lane, shared.head[inner.count - 1]);
        uint2 b, c, size;
        bool ready;
        do {
          b = load_exchanged(B_at), c = load_exchanged(B_at + kTokenState / 4), size = load_exchanged(step_at);
          ready = written(b) & written(c) & written(size);
        } while (!__all_sync(0xffffffff, ready));
        const float B[4] = {__uint_as_float(b.x << 16), __uint_as_float(b.x & 0xffff0000u), __uint_as_float(b.y << 16),
                            __uint_as_float(b.y & 0xffff0000u)};
        const float C[4] = {__uint_as_float(c.x << 16), __uint_as_float(c.x & 0xffff0000u), __uint_as_float(c.y << 16),
                            __uint_as_float(c.y & 0xffff0000u)};
        const bool held = shared.slot[token] >= 0;
        const float* own = params;
#pragma unroll
        for (int octet = 0; octet < kMostInnerOctets; ++octet) {
          if (octet >= inner.count) break;
          const int first = 8 * octet + 4 * half;
          const int head = shared.head[octet];
          const float step = __shfl_sync(0xffffffff, __uint_as_float(size.x), head);
          const float decay = __shfl_sync(0xffffffff, __uint_as_float(size.y), head);
          const float* x = zx + (channels + first) * kStackTokens + token;
          const int unit = round * tokens + token;
          float* state = reinterpret_cast<float*>(states + unit * kStateUnitBytes) + 4 * half * kTokenState + 4 * lane;
          barrier_wait(shared_address(&shared.full[unit]), round_parity);
          float4 h[4] = {};
          float of_row[4];
          if (held) {
#pragma unroll
            for (int r = 0; r < 4; ++r) h[r] = *reinterpret_cast<const float4*>(state + r * kTokenState);
          }
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float scaled = step * x[r * kStackTokens];
            h[r].x = fmaf(scaled, B[0], decay * h[r].x);
            h[r].y = fmaf(scaled, B[1], decay * h[r].y);
            h[r].z = fmaf(scaled, B[2], decay * h[r].z);
            h[r].w = fmaf(scaled, B[3], decay * h[r].w);
            of_row[r] = fmaf(h[r].x, C[0], fmaf(h[r].y, C[1], fmaf(h[r].z, C[2], h[r].w * C[3])));
            if (held) *reinterpret_cast<float4*>(state + r * kTokenState) = h[r];
          }
          copy_engine_fence();
          __syncwarp();
          if (lane == 0) barrier_arrive(shared_address(&shared.done[unit]));
          if (++round == a.state_rounds) round = 0, round_parity ^= 1;
          of_octet[octet] = add_halves(add_halves(of_row[0], of_row[2], 16), add_halves(of_row[1], of_row[3], 16), 8);
        }
        // Of an octet, lane % 8, and a row of the warp's four, lane / 8.
        float of_two[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) of_two[i] = add_halves(of_octet[i], of_octet[i + 4], 4);
        const float sum = add_halves(add_halves(of_two[0], of_two[2], 2), add_halves(of_two[1], of_two[3], 2), 1);
        const int octet = lane % 8;
        const bool counts = held && octet < inner.count;
        const int row = octet < inner.count ? 8 * octet + 4 * half + lane / 8 : 0;
        const float x = zx[(channels + row) * kStackTokens + token], z = zx[row * kStackTokens + token];
        const float out = counts ? fmaf(own[3 * channels + row], x, sum) * z : 0.0f;
        const float normed = out * own[row], scaled = normed * own[channels + row];
        const uint32_t pair = pair_of(scaled, __shfl_xor_sync(0xffffffff, scaled, 8));
        const uint32_t other = __shfl_xor_sync(0xffffffff, pair, 16);
        if (lane < inner.count) {
          store_exchanged(exchange + a.out_at + fragment_of(inner.first + octet, token) * 16 + half * 8, pair, other);
        }
        square = add_lanes(out * out, 1, 32), shifted = add_lanes(normed * own[2 * channels + row], 1, 32);
      }
      if (lane == 0) shared.state_sums[warp] = {square, shifted};
      __syncwarp();
      arrive_at_named_barrier(3, kTokenWorkers + 32 * kFetchWarps);
      if (warp < out_units) {
        const uint4* from =
            reinterpret_cast<const uint4*>(exchange + a.out_at) + (rank * out_units + warp) * kUnitK + lane;
        uint32_t out_weights[kOutUnits][kOutTiles][2];
        load_out(layer, out_weights);
        uint4 v[kOutUnits][4];
        bool ready;
        do {
#pragma unroll
          for (int u = 0; u < kOutUnits; ++u) {
#pragma unroll
            for (int o = 0; o < 4; ++o) {
              v[u][o] = uint4{};
              if (warp + kTokenWarps * u < out_units && lane / 4 < tokens) {
                v[u][o] = load_exchanged(from + kTokenWarps * u * kUnitK + 32 * o);
              }
            }
          }
          ready = all_written(v[0]) & all_written(v[1]);
        } while (!__all_sync(0xffffffff, ready));
        float c[kOutTiles][4] = {};
#pragma unroll
        for (int u = 0; u < kOutUnits; ++u) {
          if (warp + kTokenWarps * u < out_units) multiply_unit(c, out_weights[u], v[u]);
        }
#pragma unroll
        for (int m = 0; m < kOutTiles; ++m) {
          if (m < a.out_octets) keep_tile(c[m], m, a.out_octets, warp);
        }
      }
      float out_bias = 0.0f;
      if (has_out) {
        const int out_row = out_row_of_lane();
        if (l.out_bias) out_bias = l.out_bias[out_row];
        load_next(layer + 1);
        if (layer + 2 < a.count && row_of_lane() == 0) {
          const StackLayer& next = layers[layer + 2];
          prefetch_to_l2(next.in_norm + out_row);
          prefetch_to_l2(next.in_alpha + out_row);
          prefetch_to_l2(next.in_beta + out_row);
        }
        __syncwarp();
      }
      named_barrier(1, kTokenWorkers);
      send_sums(out_sources, a.out_octets, out_received, 1);
      __syncwarp();
      if (has_out) add_sources(out_sources, a.out_octets, y);
      barrier_wait(shared_address(&shared.sent[1]), layer & 1);
      if (thread == 0) barrier_arrive_expecting(shared_address(&shared.sent[1]), out_bytes);
      if (has_out) {
        barrier_wait(shared_address(&shared.totals[1]), layer & 1);
        receive(out_received, 1, a.per_inner, a.out_eps, y);
#pragma unroll
        for (int j = 0; j < 2; ++j) residual[j] += y[j] + out_bias;
      }
    }
    if (has_out) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (tokens_of_lane() + j < tokens)
          a.residual[int64_t(tokens_of_lane() + j) * a.width + out_row_of_lane()] = residual[j];
      }
    }
  }
  __syncwarp();
  wait_for_cluster();
#endif
}

}  // namespace bitkernels::cuda
