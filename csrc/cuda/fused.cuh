// A handful of tokens: one kernel from activations to output, in which no weight is ever decoded.
//
// Activations become fixed point in steps of a power of two, chosen for each token, and are taken apart into bits.
// Packed weights are bits already, so the tensor cores multiply the two as they are (bit_mma.cuh): a plane of 1-bit
// products for each bit of each token, which the epilogue adds up by weight, the highest being the sign. A ternary
// code c is two bits, so an activation q meets it as the pair q, 2 q. All of it is exact but the rounding to fixed
// point.
//
// The blocks of a cluster share 64-row tiles: each takes a part of K, so it prepares that part of the activations
// only. Its four warpgroups ask for the weights of their first tiles, and while these travel the block prepares. What
// a block has of a tile goes to the block of the cluster that owns the tile, which adds the parts in order.
//
// In a step of the Mamba-2 block the kernel may start while the one before it runs: it then brings its weights as far
// as L2. An RMSNorm goes before. Its weight is one more scale of the activations, its divisor a factor of the sums:
// squares are summed where sums of shifted activations are. Afterwards some columns take a step of the causal
// convolution (kIn), or all are added to the residual (kOut).
#pragma once

#include <cfloat>
#include <type_traits>

#include "bit_planes.cuh"
#include "cluster.cuh"
#include "epilogue.cuh"
#include "weight_ring.cuh"
#include "weights.cuh"

namespace bitkernels::cuda {

constexpr int kMostFusedPartsLog2 = 3;  // of K: the largest cluster that every card takes
constexpr int kMostFusedParts = 1 << kMostFusedPartsLog2;
constexpr int kMostTokens = 8;
constexpr int64_t kMostFusedPart = 32768;  // elements, whose sum stays within 32 bits

// A cluster's tiles, which bounds what its blocks leave for each other.
constexpr int kMostFusedTiles = 16;

// From one chunk of the activations to the next.
constexpr int plane_pitch(int columns) { return columns * 16; }

// kColumns: planes of all tokens; 16, 64 or 128. kAligned: rows of x and of the weights are whole vectors.
// A step of one token leaves room for the blocks of the next kernel.
template <typename F, typename T, int kColumns, bool kAligned, BlockStep kStep = BlockStep::kNone>
__global__ void __launch_bounds__(kFusedThreads, kStep != BlockStep::kNone && kColumns == 16 ? 2 : 1)
    fused_kernel(const __grid_constant__ FusedArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Format = FusedFormat<F, T>;
  using X = std::conditional_t<kStep == BlockStep::kIn, float, T>;
  constexpr bool kNorm = kStep != BlockStep::kNone;
  constexpr int kLimbs = Format::kLimbs;
  constexpr int kPerLane = Format::kPerLane;
  constexpr int kPerChunk = kChunkWords * F::kPerWord;
  constexpr int kPerStep = kBitMmaChunks * kPerChunk;  // a warp prepares one, eight columns of bits a lane
  constexpr int kTokens = kColumns / Format::kPlanes;
  constexpr int kTogether = kTokens < 8 ? 1 : 2;  // tokens of one lane, which share the loads of the scales
  constexpr int kPairs = kTokens / kTogether;
  constexpr int kPlanePitch = plane_pitch(kColumns);

  constexpr int kSent = kTokens > 1 ? kTokens / 2 : 1;  // values of one lane
  constexpr int kSums = kNorm ? 2 : 1;                  // of a token: shifted activations, squares
  extern __shared__ uint4 shared[];
  uint8_t* unaligned = reinterpret_cast<uint8_t*>(shared);
  uint8_t* rings = unaligned + (-shared_address(unaligned) & (kPanelAlignment - 1));  // [group][stage][panel]
  uint8_t* planes = rings + args.ring_bytes;                                          // [chunk][column]
  float* partial = reinterpret_cast<float*>(planes + args.plane_bytes);               // [tile owned][part][row][token]
  __shared__ float sums_of_lane[kSums][kTogether][kFusedThreads];
  __shared__ uint32_t most_of_token[kTokens];
  __shared__ int sum_of_token[kTokens * kLimbs];
  __shared__ float sums_of_part[kSums][kMostFusedParts * kTokens];
  __shared__ uint64_t arrived;

  const int lane = threadIdx.x % 32;
  const int warp = uniform(threadIdx.x / 32);
  const int group = warp / 4;
  const int rank = uniform(cluster_rank());
  const int cluster = uniform(cluster_index());
  const int parts_log2 = args.parts_log2;
  const int parts = 1 << parts_log2;
  const int tokens = args.tokens;
  const int tiles = args.tiles + (cluster < args.extra);
  const int64_t first_row = (int64_t(cluster) * args.tiles + min(cluster, args.extra)) * kBitMmaRows;

  // This block's part of K.
  const int all_chunks = (args.words + kChunkWords - 1) / kChunkWords;
  const int first_chunk = rank * args.part;
  const int chunks = max(min(all_chunks - first_chunk, args.part), 0);
  const int steps = (chunks + 1) / kBitMmaChunks;
  const int first_k = first_chunk * kPerChunk;
  const int end_k = min(first_k + chunks * kPerChunk, args.K);

  const int owned = (tiles - rank + parts - 1) >> parts_log2;
  // A warp prepares a step of kTogether tokens at a time, always the same tokens.
  const int first_token = warp % kPairs * kTogether;
  const bool prepares = first_token < tokens;
  float v[kTogether][kPerLane];
  float sums[kSums][kTogether] = {};
  Run<kPerLane, X> x[kTogether];
  Run<kPerLane, float> scale, shift;  // of 1-bit weights only
  Run<kPerLane, float> norm;
  const auto load = [&](int task, int from, int end) {
    const int k = from + task / kPairs * kPerStep + lane * kPerLane;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const X* row = static_cast<const X*>(args.x) + int64_t(min(first_token + j, tokens - 1)) * args.K;
      x[j].template load<kAligned>(row, k, end);
    }
    if constexpr (kNorm) norm.template load<kAligned>(args.step.norm, k, end);
    if (F::kPerWord == kSignsPerWord && args.scale) scale.template load<kAligned>(args.scale, k, end);
    if (F::kPerWord == kSignsPerWord && args.shift) shift.template load<kAligned>(args.shift, k, end);
  };
  const auto prefetch = [&](int task, int from, int end) {
    const int k = from + task / kPairs * kPerStep + lane * kPerLane;
    if (k >= end) return;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      prefetch_to_l2(static_cast<const X*>(args.x) + int64_t(min(first_token + j, tokens - 1)) * args.K + k);
    }
    if constexpr (kNorm) prefetch_to_l2(args.step.norm + k);
    if (F::kPerWord == kSignsPerWord && args.scale) prefetch_to_l2(args.scale + k);
    if (F::kPerWord == kSignsPerWord && args.shift) prefetch_to_l2(args.shift + k);
  };
  const auto scale_loaded = [&] {
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        v[j][i] = x[j][i];
        if constexpr (kNorm) {
          sums[1][j] = fmaf(v[j][i], v[j][i], sums[1][j]);
          v[j][i] *= norm[i];
        }
        if (F::kPerWord == kSignsPerWord)
          sums[0][j] = args.shift ? fmaf(v[j][i], shift[i], sums[0][j]) : sums[0][j] + v[j][i];
        if (F::kPerWord == kSignsPerWord && args.scale) v[j][i] *= scale[i];
      }
    }
  };
  // int8 has one step for the whole token, so every block looks at all of it.
  const int measured_from = F::kInteger ? 0 : first_k;
  const int measured_end = F::kInteger ? args.K : end_k;
  const int measured = F::kInteger ? (all_chunks + 1) / kBitMmaChunks * kPairs : steps * kPairs;

  WeightRing<kAligned> ring(args, rings, group, tiles, first_row, first_chunk, chunks);

  const int outputs = owned * (kTokens * kBitMmaRows);
  const auto row_of = [&](int i) {
    return first_row + int64_t((i / (kBitMmaRows * kTokens) << parts_log2) + rank) * kBitMmaRows + i % kBitMmaRows;
  };
  const auto token_of = [&](int i) { return i / kBitMmaRows % kTokens; };
  const bool has_output =
      static_cast<int>(threadIdx.x) < outputs && row_of(threadIdx.x) < args.e.columns && token_of(threadIdx.x) < tokens;

  // Nothing is read yet that the kernel before may write.
  if (threadIdx.x == 0) {
    const int values = owned * kBitMmaRows * kTokens + (args.has_plain ? kSums * tokens : 0);
    barrier_init(shared_address(&arrived), 1);
    barrier_init_fence();
    barrier_arrive_expecting(shared_address(&arrived), values * parts * static_cast<int>(sizeof(float)));
  }
  if (threadIdx.x < kTokens) most_of_token[threadIdx.x] = 0;
  if (threadIdx.x < kTokens * kLimbs) sum_of_token[threadIdx.x] = 0;
  __syncwarp();
  if (parts > 1) arrive_at_cluster();
  if constexpr (kNorm && kAligned) {
    // Each warp of the cluster a piece of its weights.
    const int64_t bytes = min(args.e.columns - first_row, int64_t(tiles) * kBitMmaRows) * 4 * args.words;
    const int64_t piece = (bytes >> parts_log2) / (kFusedWarps * kChunkBytes) * kChunkBytes + kChunkBytes;
    const int64_t from = (int64_t(rank) * kFusedWarps + warp) * piece;
    if (lane == 0 && from < bytes) {
      prefetch_to_l2(reinterpret_cast<const uint8_t*>(args.packed + first_row * args.words) + from,
                     static_cast<uint32_t>(min(piece, bytes - from)));
    }
    const int k = first_k + threadIdx.x * 32;  // a line each
    if (k < end_k) {
      if (F::kPerWord == kSignsPerWord && args.scale) prefetch_to_l2(args.scale + k);
      if (F::kPerWord == kSignsPerWord && args.shift) prefetch_to_l2(args.shift + k);
      prefetch_to_l2(args.step.norm + k);
    }
  }
  if constexpr (kStep == BlockStep::kIn) {
    if (has_output) prefetch_conv(args.step.conv, token_of(threadIdx.x), row_of(threadIdx.x));
  }
  if constexpr (kNorm) {
    if (parts > 1) wait_for_arrivals();
    let_next_kernel_start();
    wait_for_previous_kernel();
  }

  int task = warp;
  if (task < measured && prepares) load(task, measured_from, measured_end);
#pragma unroll 1
  for (int i = 0; i < kFusedStages; ++i) ring.fetch();
  if (prepares) {
#pragma unroll 1
    for (int later = task + kFusedWarps; later < measured; later += kFusedWarps)
      prefetch(later, measured_from, measured_end);
  }

  Column column{};
  ConvColumn conv{};
  float residual = 0.0f;
  const auto load_column = [&] {
    if (!has_output) return;
    const int64_t n = row_of(threadIdx.x);
    column = column_of(args.e, n);
    if constexpr (kStep == BlockStep::kIn) conv = conv_column(args.step.conv, token_of(threadIdx.x), n);
    if constexpr (kStep == BlockStep::kOut) residual = args.step.residual[token_of(threadIdx.x) * args.e.columns + n];
  };
  if constexpr (!kNorm) {
    load_column();  // needed last, and as far away as the rest
    if (parts > 1) wait_for_arrivals();
  }
  __syncthreads();

  // Forth, for the largest element, and back, for the bits: what came last need not be read again.
  if (prepares) {
    uint32_t most[kTogether] = {};
#pragma unroll 1
    while (task < measured) {
      scale_loaded();
      task += kFusedWarps;
      if (task < measured) load(task, measured_from, measured_end);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        // As integers, NaN is the largest of all.
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) most[j] = max(most[j], __float_as_uint(fabsf(v[j][i])));
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const uint32_t of_warp = __reduce_max_sync(0xffffffff, most[j]);
      if (lane == 0) atomicMax(&most_of_token[first_token + j], of_warp);
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums_of_lane[i][j][threadIdx.x] = sums[i][j];
    }
  }
  __syncthreads();
  if (prepares) {
    const int last = steps * kPairs - 1 - warp;
    bool again = F::kInteger;
    float per_unit[kTogether];
    int fixed_sums[kTogether][kLimbs] = {};
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const float absmax = __uint_as_float(most_of_token[first_token + j]);
      per_unit[j] = F::kInteger ? int8_scale(absmax) : power_of_two(-step_exponent<Format::kBits>(absmax));
    }
#pragma unroll 1
    for (task = last < 0 ? -1 : last / kFusedWarps * kFusedWarps + warp; task >= 0; task -= kFusedWarps) {
      if (again) {
        load(task, first_k, end_k);
        scale_loaded();
      }
      again = true;
      uint8_t* to = planes + (task / kPairs * kBitMmaChunks + lane / 16) * kPlanePitch +
                    (first_token * Format::kPlanes + lane % 4) * 16 + lane / 4 % 4 * 4;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        uint32_t fixed[8];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          const uint32_t q = to_fixed<F, kLimbs>(v[j][i], per_unit[j]);
          if constexpr (kLimbs == 1) {
            fixed_sums[j][0] += static_cast<int>(q << 16) >> 16;
          } else {
            fixed_sums[j][0] += static_cast<int>(q & 0xffff);
            fixed_sums[j][1] += static_cast<int>(q) >> 16;
          }
          if constexpr (kPerLane == 8) {
            fixed[i] = q;
          } else {
            fixed[2 * i] = q;
            fixed[2 * i + 1] = q << 1;
          }
        }
#pragma unroll
        for (int l = 0; l < kLimbs; ++l) {
          uint32_t plane[4];
          to_planes(fixed, l, plane);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            *reinterpret_cast<uint32_t*>(to + ((j * kLimbs + l) * kPlanesPerLimb + 4 * i) * 16) = plane[i];
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
#pragma unroll
      for (int l = 0; l < kLimbs; ++l) {
        const int of_warp = __reduce_add_sync(0xffffffff, fixed_sums[j][l]);
        if (lane == 0) atomicAdd(&sum_of_token[(first_token + j) * kLimbs + l], of_warp);
      }
    }
  }
  copy_engine_fence();
  __syncthreads();

  // In a step it is near: under way while the tensor cores work, and no burden to what came before.
  if constexpr (kNorm) load_column();

  // The last warps, which are the first to run out of tiles, tell every block of the cluster.
  const int plain_token = kFusedWarps - 1 - warp;
  if (args.has_plain && plain_token < tokens) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kFusedWarps / kPairs; ++i) {
        sum += sums_of_lane[s][plain_token % kTogether][(i * kPairs + plain_token / kTogether) * 32 + lane];
      }
      sum = warp_reduce(sum, Sum());
      if (lane < parts) {
        const uint32_t bits[1] = {__float_as_uint(sum)};
        send(reinterpret_cast<uint32_t*>(&sums_of_part[s][rank * kTokens + plain_token]), &arrived, lane, parts, bits);
      }
    }
  }

#pragma unroll 1
  for (int tile = group; tile < tiles; tile += kFusedGroups) {
    int d[kColumns / 2] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk += args.width) {
      const uint8_t* stage = ring.wait();
      const uint64_t b = chunk_descriptor(shared_address(planes + chunk * kPlanePitch), kPlanePitch);
      const int products = (min(chunks - chunk, args.width) + 1) / kBitMmaChunks;
#pragma unroll 1
      for (int s = 0; s < products; ++s) {
        const uint64_t a = panel_descriptor(shared_address(stage), s);
        wgmma_fence();
        wgmma_bits(d, a, b + (s * kBitMmaChunks * kPlanePitch >> 4), 1);
        wgmma_commit();
      }
      wgmma_wait<0>();
      pin(d);
      ring.release();
    }

    const int t = lane % 4;
    int sum[kLimbs][kSent];
#pragma unroll
    for (int l = 0; l < kLimbs; ++l) add_planes<kTokens, kLimbs>(d, l, sum[l]);
    const int first_sent = kTokens > 1 ? t % 2 * kSent : 0;
    uint32_t values[kSent];
#pragma unroll
    for (int i = 0; i < kSent; ++i) {
      const int m = first_sent + i;
#pragma unroll
      for (int l = 0; l < kLimbs; ++l) sum[l][i] = F::kStep * sum[l][i] - sum_of_token[m * kLimbs + l];
      if constexpr (F::kInteger) {
        values[i] = static_cast<uint32_t>(sum[0][i]);
      } else {
        const float absmax = __uint_as_float(most_of_token[m]);
        // Fixed point has no infinities: a token that holds one, or NaN, gives NaN.
        const float unit = absmax <= FLT_MAX ? power_of_two(step_exponent<Format::kBits>(absmax)) : NAN;
        float f = static_cast<float>(sum[0][i]);
        if constexpr (kLimbs == 2) f = fmaf(static_cast<float>(sum[1][i]), 65536.0f, f);
        values[i] = __float_as_uint(f * unit);
      }
    }
    float* to = partial + (((tile >> parts_log2) << parts_log2) + rank) * (kTokens * kBitMmaRows) +
                (warp % 4 * kMmaRows + t / 2 * 8 + lane / 4) * kTokens + first_sent;
    if (kTokens > 1 || t % 2 == 0) send(reinterpret_cast<uint32_t*>(to), &arrived, tile & (parts - 1), parts, values);
  }
  if (parts == 1) {
    __syncthreads();
  } else {
    barrier_wait(shared_address(&arrived), 0);
  }

#pragma unroll 1
  for (int i = threadIdx.x; i < outputs; i += kFusedThreads) {
    const int64_t n = row_of(i);
    const int m = token_of(i);
    if (m >= tokens || n >= args.e.columns) continue;
    if (i >= kFusedThreads) {
      column = column_of(args.e, n);
      if constexpr (kStep == BlockStep::kIn) conv = conv_column(args.step.conv, m, n);
      if constexpr (kStep == BlockStep::kOut) residual = args.step.residual[m * args.e.columns + n];
    }
    const float* from =
        partial + (i / (kBitMmaRows * kTokens) << parts_log2) * (kTokens * kBitMmaRows) + i % kBitMmaRows * kTokens + m;
    float y;
    if constexpr (F::kInteger) {
      int sum = 0;
#pragma unroll 1
      for (int p = 0; p < parts; ++p) sum += __float_as_int(from[p * (kTokens * kBitMmaRows)]);
      y = finish(args.e, Token{int8_scale(__uint_as_float(most_of_token[m])), 0.0f, 0.0f}, column, sum);
    } else {
      float sum = 0.0f;
      float of_token[kSums] = {};
#pragma unroll 1
      for (int p = 0; p < parts; ++p) {
        sum += from[p * (kTokens * kBitMmaRows)];
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
          if (args.has_plain) of_token[s] += sums_of_part[s][p * kTokens + m];
        }
      }
      if constexpr (kNorm) {
        const float inverse = rsqrtf(__fdividef(of_token[1], static_cast<float>(args.K)) + args.step.eps);
        sum *= inverse;
        of_token[0] *= inverse;
      }
      y = finish(args.e, Token{1.0f, 0.0f, of_token[0]}, column, sum);
    }
    const int64_t at = m * args.e.columns + n;
    if constexpr (kStep == BlockStep::kOut) {
      args.step.residual[at] = residual + y;
    } else {
      T out = from_float<T>(y);
      if constexpr (kStep == BlockStep::kIn) {
        if (conv.at >= 0) out = from_float<T>(step_convolution(args.step.conv, conv, to_float(out)));
      }
      static_cast<T*>(args.e.out)[at] = out;
    }
  }
#endif
}

}  // namespace bitkernels::cuda
