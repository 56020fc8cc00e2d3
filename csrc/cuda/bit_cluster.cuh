// A few tokens times packed weights in one launch: no weight is decoded and nothing is prepared beforehand.
//
// The blocks of a cluster share tiles of rows and split K. A block makes planes of bits of its part of the activations
// (bit_planes.cuh), in steps of the part's own, and keeps them in shared memory; weights pass through as they are, and
// the tensor cores count where both are set (bit_mma.cuh). What a block has of a row goes to the block of the cluster
// that owns the row, which adds the parts in order. So no block waits for another before its products are done.
//
// What such a call takes is one latency after the other, so each is kept short: activations and scales go from memory
// to registers and stay there until they are bits; all warps ask for weights; what follows a wait is computed before
// it; and what the outputs need last, the sums of shifted activations, is added up by warps that have no products.
//
// In a step of the Mamba-2 block an RMSNorm goes before. Its weight is one more scale of the activations, its divisor a
// factor of the sums: squares are summed where shifted activations are. The kernel may start while the one before it
// runs, but for want of room most blocks start when that has ended, so nothing is done before activations are asked
// for.
#pragma once

#include <cfloat>

#include "bit_mma.cuh"
#include "bit_planes.cuh"
#include "cluster.cuh"
#include "conv_step.cuh"
#include "epilogue.cuh"
#include "reduce.cuh"
#include "weights.cuh"
#include "wgmma.cuh"

namespace bitkernels::cuda {

constexpr int kClusterGroups = 4;                  // warpgroups, which prepare and multiply
constexpr int kClusterWarps = 4 * kClusterGroups;  // and one more, which brings weights
constexpr int kClusterThreads = 32 * (kClusterWarps + 1);
constexpr int kMostPartsLog2 = 3;  // the largest cluster that every card takes
constexpr int kMostParts = 1 << kMostPartsLog2;
constexpr int kMostClusterStages = 24;
constexpr int kClusterStageBytes = kBitMmaRows * kPanelRowBytes;
constexpr int kPanelSteps = kPanelChunks / kBitMmaChunks;
constexpr int kStepBytesOfRow = kBitMmaChunks * kChunkBytes;

// What is needed first comes first: constants arrive a line at a time.
struct BitClusterArgs {
  CUtensorMap weights;  // bytes of a part, parts, rows
  const void* x;
  const float* scale;  // [K] or null
  const float* shift;  // [K] or null
  int K;
  int part;  // elements of a row, of a part
  int tokens;
  int steps;          // of 256 columns of bits, in a part: at most one a warp
  int steps_inverse;  // 2^16 / steps, rounded up
  int sharers;        // warps that share a step
  int tile_rows;      // at most 64
  int tiles;          // of all rows
  int16_t tiles_of_cluster;
  int8_t stages;
  int8_t parts_log2;
  Epilogue e;
  StepOperands step;
};

// Where things lie in shared memory, in bytes. kColumns: planes of all tokens.
template <typename F, typename T, int kColumns, BlockStep kStep>
struct BitClusterLayout {
  using Format = FusedFormat<F, T>;
  static constexpr int kTokens = kColumns / Format::kPlanes;
  static constexpr int kPerStep = 32 * Format::kPerLane;           // activations
  static constexpr int kPlanePitch = kColumns * kChunkBytes;       // from chunk to chunk
  static constexpr int kSums = kStep == BlockStep::kNone ? 1 : 2;  // of a token: shifted activations, squares
  int planes, most, plain, partial, bytes;

  __host__ __device__ explicit BitClusterLayout(const BitClusterArgs& a) {
    planes = a.stages * kClusterStageBytes;
    most = planes + a.steps * kBitMmaChunks * kPlanePitch;
    plain = most + a.steps * kTokens * 4;
    partial = (plain + a.steps * kSums * kTokens * 4 + 15) / 16 * 16;
    bytes = partial + a.tiles_of_cluster * kBitMmaRows * kTokens * 4;
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Sums over the warp of kCount values, a power of two: value i in the lanes that have i in their upper bits.
template <int kCount>
__device__ float sum_each(const float (&v)[kCount]) {
  float kept[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) kept[i] = v[i];
  int bit = 16;
#pragma unroll
  for (int count = kCount / 2; count > 0; count /= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) kept[i] = add_halves(kept[i], kept[i + count], bit);
    bit /= 2;
  }
#pragma unroll
  for (; bit > 0; bit /= 2) kept[0] += __shfl_xor_sync(0xffffffff, kept[0], bit);
  return kept[0];
}

#endif

// kTurns: the most tokens that a warp prepares.
template <typename F, typename T, int kColumns, int kTurns, BlockStep kStep = BlockStep::kNone>
__global__ void __launch_bounds__(kClusterThreads, 1) bit_cluster_kernel(const __grid_constant__ BitClusterArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Format = FusedFormat<F, T>;
  using Layout = BitClusterLayout<F, T, kColumns, kStep>;
  using X = std::conditional_t<kStep == BlockStep::kIn, float, T>;
  constexpr bool kNorm = kStep != BlockStep::kNone;
  constexpr int kSums = Layout::kSums;
  constexpr int kLimbs = Format::kLimbs;
  constexpr int kPerLane = Format::kPerLane;
  constexpr int kTokens = Layout::kTokens;
  constexpr int kPlanePitch = Layout::kPlanePitch;
  constexpr int kSent = kTokens > 1 ? kTokens / 2 : 1;               // sums of a lane
  constexpr int kRunsLog2 = (kTokens > 1) + (kNorm && kTokens > 4);  // outputs of a row
  constexpr int kSpan = kTokens >> kRunsLog2;                        // tokens of each
  constexpr int kSummed = kTurns == 3 ? 4 : kTurns;
  constexpr int kWorkers = 32 * kClusterWarps;
  constexpr bool kSigns = F::kPerWord == kSignsPerWord;
  extern __shared__ uint4 shared[];
  __shared__ uint64_t full[kMostClusterStages], empty[kMostClusterStages], arrived, measured, shifted;
  __shared__ float unit_of_token[kTokens];
  __shared__ int sum_of_token[kTokens * kLimbs];
  __shared__ alignas(16) float plain_of_part[kSums][kMostParts][kTokens];
  __shared__ uint32_t most_of_part[F::kInteger ? kMostParts : 1][kTokens];
  if (threadIdx.x == kWorkers) prefetch_map(&args.weights);

  // Activations first: of one step of 256 columns, tokens sharer + j * sharers. The last warps have fewest tiles.
  const int lane = threadIdx.x % 32;
  const int warp = uniform(threadIdx.x / 32);
  const int rank = cluster_rank();
  const int tokens = args.tokens;
  const int place = kClusterWarps - 1 - warp;
  const int sharer = place * args.steps_inverse >> 16;
  const int step = place - sharer * args.steps;
  const bool prepares = place >= 0 && sharer < args.sharers;
  Run<kPerLane, X> x[kTurns];
  Run<kPerLane, float> scale, shift, norm;
  if constexpr (kNorm) {
    let_next_kernel_start();
    wait_for_previous_kernel();
  }
  if (prepares) {
    const int k = rank * args.part + step * Layout::kPerStep + lane * kPerLane;
    const int end = min(args.K, (rank + 1) * args.part);
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      const int m = sharer + j * args.sharers;
      x[j].template load<true>(static_cast<const X*>(args.x) + int64_t(m) * args.K, k, m < tokens ? end : 0);
    }
    if constexpr (kSigns) {
      scale.load_or_one(args.scale, k, end);
      shift.load_or_one(args.shift, k, end);
    }
    if constexpr (kNorm) norm.template load<true>(args.step.norm, k, end);
  }

  const int parts_log2 = args.parts_log2;
  const int parts = 1 << parts_log2;
  const int stages = args.stages;
  uint8_t* data = reinterpret_cast<uint8_t*>(shared) + (-shared_address(shared) & (kPanelAlignment - 1));
  const SharedAddress here = shared_address(data);
  const Layout at(args);
  const int panels = (args.steps + kPanelSteps - 1) / kPanelSteps;
  const int first_tile = cluster_index() * args.tiles_of_cluster;
  const int tiles = min(int(args.tiles_of_cluster), args.tiles - first_tile);

  // Panel by panel of as many tiles as there are warpgroups. A stage always serves the same warpgroup, as one that
  // waits for its second round while another still waits for the first would take one phase for the other.
  struct Box {
    int tile, panel;
  };
  const auto box_at = [&](int i) {
    Box box{i % kClusterGroups, i / kClusterGroups};
    while (box.panel >= panels) {
      box.panel -= panels;
      box.tile += kClusterGroups;
    }
    return box;
  };
  const auto ask = [&](const Box& box, int stage) {
    const SharedAddress barrier = shared_address(full) + stage * 8;
    barrier_arrive_expecting(barrier, args.tile_rows * kPanelRowBytes);
    load_box(&args.weights, here + stage * kClusterStageBytes, barrier, box.panel * kPanelRowBytes, rank,
             (first_tile + box.tile) * args.tile_rows);
  };
  if (warp == kClusterWarps) {
    if (lane == 0) {
      barrier_init(shared_address(&arrived), 1);
      barrier_init(shared_address(&measured), 1);
      barrier_init(shared_address(&shifted), args.steps * args.sharers * kSums * kSummed);
      barrier_init_fence();
      if (parts > 1) {
        const int sums = tiles * (kBitMmaRows >> parts_log2) * kTokens;
        barrier_arrive_expecting(shared_address(&arrived), ((sums + (kSigns ? kSums * tokens : 0)) << parts_log2) * 4);
        if (F::kInteger) barrier_arrive_expecting(shared_address(&measured), (tokens << parts_log2) * 4);
      }
    }
  } else if (lane == 0) {
    // One warp alone would ask for all of the first weights too late.
#pragma unroll 1
    for (int i = warp; i < stages; i += kClusterWarps) {
      barrier_init(shared_address(&full[i]), 1);
      barrier_init(shared_address(&empty[i]), 4);
      barrier_init_fence();
      const Box box = box_at(i);
      if (box.tile < tiles) ask(box, i);
    }
  }
  __syncwarp();
  if (threadIdx.x < kTokens * kLimbs) sum_of_token[threadIdx.x] = 0;
  __syncthreads();
  if (parts > 1) arrive_at_cluster();

  if (warp == kClusterWarps) {
    if constexpr (kStep == BlockStep::kIn) {
      // What the convolution reads, of four columns of the block's share of each tile and token.
      const int between = ((kBitMmaRows >> parts_log2) - 1) / 3;
#pragma unroll 1
      for (int i = lane; i < 4 * tiles * tokens; i += 32) {
        const int tile = i / (4 * tokens);
        const int row_of_tile = (rank * kBitMmaRows >> parts_log2) + i % 4 * between;
        prefetch_conv(args.step.conv, i / 4 - tile * tokens, int64_t(first_tile + tile) * args.tile_rows + row_of_tile);
      }
    }
    if (lane == 0) {
      Box box = box_at(stages);
      int stage = 0, parity = 0;
#pragma unroll 1
      while (box.tile / kClusterGroups * kClusterGroups < tiles) {
        if (box.tile < tiles) {
          barrier_wait(shared_address(empty) + stage * 8, parity);
          ask(box, stage);
        }
        if (++stage == stages) stage = 0, parity ^= 1;
        if (++box.tile % kClusterGroups == 0) {
          if (++box.panel < panels) {
            box.tile -= kClusterGroups;
          } else {
            box.panel = 0;
          }
        }
      }
      // Until the products are done: what is still to be asked for then would hold up the end of this kernel.
      if constexpr (kStep == BlockStep::kIn) {
        prefetch_ahead(args.step.states, [&] { return parts > 1 && barrier_passed(shared_address(&arrived), 0); });
      }
    }
    __syncwarp();
    if (parts > 1) wait_for_arrivals();
    return;
  }

  // This lane's place in the products, and the first output of this thread.
  const int group = warp / 4;
  const int t = lane % 4;
  const int row = warp % 4 * kMmaRows + t / 2 * 8 + lane / 4;  // whose sums this lane gets
  const int first_sent = kTokens > 1 ? t % 2 * kSent : 0;
  const int rows_log2 = 6 - parts_log2;  // of a tile, which this block owns
  const int rows_mask = (1 << rows_log2) - 1;
  // Sums lie [tile][part][row][token].
  float* sent_to =
      reinterpret_cast<float*>(data + at.partial) + ((rank << rows_log2) + (row & rows_mask)) * kTokens + first_sent;
  const int outputs = tiles << (rows_log2 + kRunsLog2);
  using Out = std::conditional_t<kStep == BlockStep::kOut, float, T>;
  struct Output {
    SharedAddress from;
    int n;      // column
    int first;  // token
    int count;  // of tokens; 0: none
    Column column;
    Out* to;
    float residual[kSpan];
  };
  const auto output_at = [&](int i) {
    const int r = i & rows_mask;
    const int tile = i >> (rows_log2 + kRunsLog2);
    const int row_of_tile = (rank << rows_log2) + r;
    const int64_t n = int64_t(first_tile + tile) * args.tile_rows + row_of_tile;
    Output o;
    o.n = static_cast<int>(n);
    o.first = (i >> rows_log2) % (1 << kRunsLog2) * kSpan;
    o.from = here + at.partial + (((tile << 6) + r) * kTokens + o.first) * 4;
    o.to = (kStep == BlockStep::kOut ? reinterpret_cast<Out*>(args.step.residual) : static_cast<Out*>(args.e.out)) +
           o.first * args.e.columns + n;
    o.count = i < outputs && row_of_tile < args.tile_rows && n < args.e.columns ? tokens - o.first : 0;
    o.column = o.count > 0 ? column_of(args.e, n) : Column{};
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
      if constexpr (kStep == BlockStep::kOut) o.residual[j] = j < o.count ? o.to[j * args.e.columns] : 0.0f;
    }
    return o;
  };
  Output output = output_at(threadIdx.x);
  if (parts > 1) wait_for_arrivals();

  uint32_t* most_of_steps = reinterpret_cast<uint32_t*>(data + at.most);  // [step][token]
  float v[kTurns][kPerLane], plain[kSums * kSummed] = {};
  if (prepares) {
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      // As integers, NaN is the largest of all.
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        v[j][i] = x[j][i];
        if constexpr (kNorm) {
          plain[kSummed + j] = fmaf(v[j][i], v[j][i], plain[kSummed + j]);
          v[j][i] *= norm[i];
        }
        if constexpr (kSigns) {
          plain[j] = fmaf(v[j][i], shift[i], plain[j]);
          v[j][i] *= scale[i];
        }
        most = max(most, __float_as_uint(fabsf(v[j][i])));
      }
      most = __reduce_max_sync(0xffffffff, most);
      const int m = sharer + j * args.sharers;
      if (lane == 0 && m < tokens) most_of_steps[step * kTokens + m] = most;
    }
  }
  named_barrier(1, kWorkers);
  const auto most_of_token = [&](int m) {
    return __reduce_max_sync(0xffffffff, lane < args.steps ? most_of_steps[lane * kTokens + m] : 0);
  };
  // int8 has one step for the whole token.
  if (F::kInteger && parts > 1) {
    for (int m = warp; m < tokens; m += kClusterWarps) {
      const uint32_t most[1] = {most_of_token(m)};
      if (lane < parts) send(&most_of_part[rank][m], &measured, lane, parts, most);
    }
    barrier_wait(shared_address(&measured), 0);
  }

  if (prepares) {
    uint8_t* words =
        data + at.planes + (step * kBitMmaChunks + lane / 16) * kPlanePitch + t * kChunkBytes + lane / 4 % 4 * 4;
    // No branch between the tokens, so that their instructions mix; a token beyond the last is zero.
    uint32_t plane[kTurns][kLimbs][4];
    int sums[kTurns][kLimbs] = {};
    float unit[kTurns];
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      const int m = min(sharer + j * args.sharers, tokens - 1);
      uint32_t most = most_of_token(m);
      if (F::kInteger && parts > 1) {
#pragma unroll 1
        for (int p = 0; p < parts; ++p) most = max(most, most_of_part[p][m]);
      }
      const float absmax = __uint_as_float(most);
      const int exponent = step_exponent<Format::kBits>(absmax);
      const float per_unit = F::kInteger ? int8_scale(absmax) : power_of_two(-exponent);
      // Fixed point has no infinities: a token that holds one, or NaN, gives NaN.
      unit[j] = F::kInteger ? per_unit : absmax <= FLT_MAX ? power_of_two(exponent) : NAN;
      uint32_t fixed[8];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const uint32_t q = to_fixed<F, kLimbs>(v[j][i], per_unit);
        if constexpr (kLimbs == 1) {
          sums[j][0] += static_cast<int>(q - kZeroOf<F>);
        } else {
          sums[j][0] += static_cast<int>(q & 0xffff);
          sums[j][1] += static_cast<int>(q) >> 16;
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
        to_planes(fixed, l, plane[j][l]);
        sums[j][l] = __reduce_add_sync(0xffffffff, sums[j][l]);
      }
    }
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      const int m = sharer + j * args.sharers;
      if (m >= tokens) break;
#pragma unroll
      for (int l = 0; l < kLimbs; ++l) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          *reinterpret_cast<uint32_t*>(words + (m * Format::kPlanes + l * kPlanesPerLimb + 4 * i) * kChunkBytes) =
              plane[j][l][i];
        }
        if (lane == 0) atomicAdd(&sum_of_token[m * kLimbs + l], sums[j][l]);
      }
      if (step == 0 && lane == 0) unit_of_token[m] = unit[j];
    }
  }
  copy_engine_fence();
  named_barrier(1, kWorkers);

  // What only outputs want is added up while weights are still to come, or beside the products.
  const auto add_plain = [&] {
    if (!kSigns || !prepares) return;
    float* plain_of_steps = reinterpret_cast<float*>(data + at.plain);  // [step][sum][token]
    constexpr int kSharing = 32 / (kSums * kSummed);                    // lanes that have the same sum
    const float sum = sum_each(plain);
    const int i_sum = lane / kSharing;
    const int m = sharer + i_sum % kSummed * args.sharers;
    if (lane % kSharing == 0) {
      if (m < tokens) plain_of_steps[(step * kSums + i_sum / kSummed) * kTokens + m] = sum;
      barrier_arrive(shared_address(&shifted));
    }
    __syncwarp();
    // The last warp tells every block of the cluster.
    if (place > 0) return;
    barrier_wait(shared_address(&shifted), 0);
#pragma unroll 1
    for (int i = lane; i < kSums * tokens << parts_log2; i += 32) {
      const int i_sum = (i >> parts_log2) % kSums;
      const int of = (i >> parts_log2) / kSums;
      float total = 0.0f;
#pragma unroll 1
      for (int s = 0; s < args.steps; ++s) total += plain_of_steps[(s * kSums + i_sum) * kTokens + of];
      const uint32_t bits[1] = {__float_as_uint(total)};
      send(reinterpret_cast<uint32_t*>(&plain_of_part[i_sum][rank][of]), &arrived, i & (parts - 1), parts, bits);
    }
    __syncwarp();
  };
  if (kTurns == 1 || group >= tiles) add_plain();
  int sum_of_lane[kSent][kLimbs];
  float unit_of_lane[kSent];
#pragma unroll
  for (int i = 0; i < kSent; ++i) {
    unit_of_lane[i] = unit_of_token[first_sent + i];
#pragma unroll
    for (int l = 0; l < kLimbs; ++l) sum_of_lane[i][l] = sum_of_token[(first_sent + i) * kLimbs + l];
  }

  const uint64_t first_b = chunk_descriptor(here + at.planes, kPlanePitch);
  int stage = group, parity = 0;
#pragma unroll 1
  for (int tile = group; tile < tiles; tile += kClusterGroups) {
    int d[kColumns / 2];
    int left = args.steps;
    int last = -1;
    int accumulate = 0;
    uint64_t b = first_b;
#pragma unroll 1
    while (left > 0) {
      barrier_wait(shared_address(full) + stage * 8, parity);
      uint64_t a = wgmma_descriptor(here + stage * kClusterStageBytes);
#pragma unroll 1
      for (int s = min(left, kPanelSteps); s > 0; --s) {
        wgmma_fence();
        wgmma_bits(d, a, b, accumulate);
        accumulate = 1;
        a += kStepBytesOfRow >> 4;
        b += kBitMmaChunks * kPlanePitch >> 4;
      }
      wgmma_commit();
      left -= kPanelSteps;
      // One panel is always under way.
      if (last >= 0) {
        wgmma_wait<1>();
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(empty) + last * 8);
      }
      last = stage;
      stage += kClusterGroups;
      if (stage >= stages) stage -= stages, parity ^= 1;
    }
    if (kTurns > 1 && tile == group) add_plain();
    wgmma_wait<0>();
    pin(d);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(empty) + last * 8);

    int sum[kLimbs][kSent];
#pragma unroll
    for (int l = 0; l < kLimbs; ++l) add_planes<kTokens, kLimbs>(d, l, sum[l]);
    uint32_t values[kSent];
#pragma unroll
    for (int i = 0; i < kSent; ++i) {
#pragma unroll
      for (int l = 0; l < kLimbs; ++l) sum[l][i] = F::kStep * sum[l][i] - sum_of_lane[i][l];
      if constexpr (F::kInteger) {
        values[i] = static_cast<uint32_t>(sum[0][i]);
      } else {
        float f = static_cast<float>(sum[0][i]);
        if constexpr (kLimbs == 2) f = fmaf(static_cast<float>(sum[1][i]), 65536.0f, f);
        values[i] = __float_as_uint(f * unit_of_lane[i]);
      }
    }
    if (kTokens > 1 || t % 2 == 0) {
      send(reinterpret_cast<uint32_t*>(sent_to + (tile << 6) * kTokens), &arrived, row >> rows_log2, parts, values);
    }
  }
  // From L2, as sums are on their way: before, its registers were taken.
  ConvTokens<kSpan> conv;
  if constexpr (kStep == BlockStep::kIn) conv.load(args.step.conv, output.first, output.count, output.n);
  if (parts == 1) {
    named_barrier(1, kWorkers);
  } else {
    barrier_wait(shared_address(&arrived), 0);
  }

#pragma unroll 1
  for (int i = threadIdx.x; i < outputs;) {
    float sum[kSpan] = {}, of_token[kSums][kSpan] = {};
    int integer_sum[kSpan] = {};
#pragma unroll 1
    for (int p = 0; p < parts; ++p) {
      uint32_t words[kSpan];
      load_words(output.from, words);
      output.from += kTokens << (rows_log2 + 2);
#pragma unroll
      for (int j = 0; j < kSpan; ++j) {
        if constexpr (F::kInteger) integer_sum[j] += static_cast<int>(words[j]);
        sum[j] += __uint_as_float(words[j]);
      }
#pragma unroll
      for (int s = 0; kSigns && s < kSums; ++s) {
        load_words(shared_address(&plain_of_part[s][p][output.first]), words);
#pragma unroll
        for (int j = 0; j < kSpan; ++j) of_token[s][j] += __uint_as_float(words[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
      if (j >= output.count) break;
      float y;
      if constexpr (F::kInteger) {
        y = finish(args.e, Token{unit_of_token[output.first + j], 0.0f, 0.0f}, output.column, integer_sum[j]);
      } else {
        if constexpr (kNorm) {
          const float inverse = rsqrtf(__fdividef(of_token[1][j], static_cast<float>(args.K)) + args.step.eps);
          sum[j] *= inverse;
          of_token[0][j] *= inverse;
        }
        y = finish(args.e, Token{1.0f, 0.0f, of_token[0][j]}, output.column, sum[j]);
      }
      if constexpr (kStep == BlockStep::kOut) {
        output.to[j * args.e.columns] = output.residual[j] + y;
      } else {
        T out = from_float<T>(y);
        if constexpr (kStep == BlockStep::kIn) {
          if (conv.channel) out = from_float<T>(conv.step(args.step.conv, j, to_float(out)));
        }
        output.to[j * args.e.columns] = out;
      }
    }
    i += kWorkers;
    if (i < outputs) {
      output = output_at(i);
      if constexpr (kStep == BlockStep::kIn) conv.load(args.step.conv, output.first, output.count, output.n);
    }
  }
#endif
}

}  // namespace bitkernels::cuda
