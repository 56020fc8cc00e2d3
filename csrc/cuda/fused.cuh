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
#pragma once

#include <array>
#include <cfloat>
#include <type_traits>

#include "bit_mma.cuh"
#include "bit_planes.cuh"
#include "epilogue.cuh"
#include "weights.cuh"

namespace bitkernels::cuda {

constexpr int kFusedWarps = 16;
constexpr int kFusedThreads = 32 * kFusedWarps;
constexpr int kFusedGroups = kFusedWarps / 4;  // warpgroups, each with tiles of its own
constexpr int kMostFusedPartsLog2 = 3;         // of K: the largest cluster that every card takes
constexpr int kMostFusedParts = 1 << kMostFusedPartsLog2;
constexpr int kMostTokens = 8;
constexpr int64_t kMostFusedPart = 32768;  // elements, whose sum stays within 32 bits

// Weights pass through shared memory in stages of 64 rows times kStageChunks 16-byte chunks.
constexpr int kStageChunks = 8;
constexpr int kFusedStages = 4;  // of a warpgroup, one being consumed: 98 KB in flight for the block
constexpr int kChunkWords = 4;
constexpr int kWeightPitch = kBitMmaRows * 16;
constexpr int kStageBytes = kStageChunks * kWeightPitch;
constexpr int kRingBytes = kFusedGroups * kFusedStages * kStageBytes;

// A cluster's tiles, which bounds what its blocks leave for each other.
constexpr int kMostFusedTiles = 16;

// From one chunk of the activations to the next.
constexpr int plane_pitch(int columns) { return columns * 16; }

// Bits of the largest activation, sign aside: 15 for bf16, which has 8 itself, and 31 for fp16 (11) and fp32 (24).
// A ternary code doubles the activation, which takes one.
template <typename F, typename T>
struct FusedFormat {
  static constexpr int kLimbs = F::kInteger || std::is_same_v<T, bf16> ? 1 : 2;
  static constexpr int kPlanes = kLimbs * kPlanesPerLimb;
  static constexpr int kCodeBits = 32 / F::kPerWord;
  static constexpr int kBits = kPlanes - kCodeBits;
  static constexpr int kPerLane = 8 / kCodeBits;  // activations that make 8 columns of bits
};

struct FusedArgs {
  const void* x;
  const float* scale;  // [K] or null
  const float* shift;  // [K] or null
  const uint32_t* packed;
  Epilogue e;
  int K;
  int words;
  int tokens;
  int tiles;  // of 64 rows: as many for each cluster, one more for the first `extra`
  int extra;
  int parts_log2;  // blocks of a cluster
  int plane_bytes;
  bool has_plain;
  bool vector_x, vector_w;
};

// The exponent of the step: the largest element is below 2^kBits steps, rounding included.
template <int kBits>
__device__ int step_exponent(float absmax) {
  const int exponent = static_cast<int>(__float_as_uint(absmax * (1.0f + 1.0f / 16384.0f)) >> 23) - 127;
  return max(exponent - (kBits - 1), -120);
}

// A value to fixed point; bits above those in use are arbitrary.
template <typename F, int kLimbs>
__device__ uint32_t to_fixed(float v, float per_unit) {
  if constexpr (F::kInteger) return static_cast<uint32_t>(to_int8(v, per_unit));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
  if constexpr (kLimbs == 1) return __float_as_uint(fmaf(v, per_unit, 12582912.0f));
  return static_cast<uint32_t>(__float2int_rn(v * per_unit));
}

// kCount elements of a row, zero from `end` on.
template <int kCount, typename T>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Run {
  T e[kCount];

  __device__ void load(const T* row, int k, int end, bool vector) {
    if (vector) {
      *this = k < end ? *reinterpret_cast<const Run*>(row + k) : Run{};
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) e[i] = k + i < end ? row[k + i] : T(0.0f);
    }
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The same in all lanes, which the compiler cannot know: branches on it do not diverge.
__device__ inline int uniform(int v) { return __shfl_sync(0xffffffff, v, 0); }

__device__ inline int cluster_index() {
  int i;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(i));
  return i;
}
__device__ inline int rank_in_cluster() {
  int i;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(i));
  return i;
}
__device__ inline void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A barrier that opens once `bytes` have been sent to this block. Blocks learn of it by meeting at the cluster.
__device__ inline void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;\n"
      "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
          shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void wait_for_bytes(uint64_t* barrier) {
  asm volatile(
      "{\n.reg .pred open;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 open, [%0], 0;\n"
      "@!open bra wait;\n}" ::"r"(shared_address(barrier))
      : "memory");
}

// Stores to where `to`, an address of this block's shared memory, lies in block `rank` of a cluster of `parts` blocks.
__device__ inline void send(void* to, uint64_t* barrier, int rank, int parts, uint32_t v) {
  if (parts == 1) {
    *static_cast<uint32_t*>(to) = v;
    return;
  }
  asm volatile(
      "{\n.reg .b32 address, barrier;\nmapa.shared::cluster.u32 address, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [address], %3, [barrier];\n}" ::"r"(
          shared_address(to)),
      "r"(shared_address(barrier)), "r"(rank), "r"(v)
      : "memory");
}

__device__ inline void warpgroup_barrier(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

#endif

// kColumns: planes of all tokens; 16, 64 or 128.
template <typename F, typename T, int kColumns>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_kernel(const __grid_constant__ FusedArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Format = FusedFormat<F, T>;
  constexpr int kLimbs = Format::kLimbs;
  constexpr int kPerLane = Format::kPerLane;
  constexpr int kPerChunk = kChunkWords * F::kPerWord;
  constexpr int kPerStep = kBitMmaChunks * kPerChunk;  // a warp prepares one, eight columns of bits a lane
  constexpr int kTokens = kColumns / Format::kPlanes;
  constexpr int kTogether = kTokens < 8 ? 1 : 2;  // tokens of one lane, which share the loads of the scales
  constexpr int kPairs = kTokens / kTogether;
  constexpr int kPlanePitch = plane_pitch(kColumns);
  constexpr int kProducts = kColumns < 64 ? 1 : kColumns / 64;
  constexpr int kBlocksOfColumns = kColumns / kProducts / 8;

  extern __shared__ __align__(128) uint4 shared[];
  uint8_t* weights = reinterpret_cast<uint8_t*>(shared);                 // [group][stage][chunk][row]
  uint8_t* planes = weights + kRingBytes;                                // [chunk][column]
  float* partial = reinterpret_cast<float*>(planes + args.plane_bytes);  // [tile owned][part][token][row]
  __shared__ float plain_of_lane[kTogether][kFusedThreads];
  __shared__ uint32_t most_of_token[kTokens];
  __shared__ int sum_of_token[kTokens * kLimbs];
  __shared__ float plain_of_part[kMostFusedParts * kTokens];
  __shared__ uint64_t arrived;

  const int lane = threadIdx.x % 32;
  const int warp = uniform(threadIdx.x / 32);
  const int group = warp / 4;
  const int rank = uniform(rank_in_cluster());
  const int cluster = uniform(cluster_index());
  const int parts_log2 = args.parts_log2;
  const int parts = 1 << parts_log2;
  const int tokens = args.tokens;
  const int tiles = args.tiles + (cluster < args.extra);
  const int64_t first_row = (int64_t(cluster) * args.tiles + min(cluster, args.extra)) * kBitMmaRows;

  // This block's part of K.
  const int all_chunks = (args.words + kChunkWords - 1) / kChunkWords;
  const int first_chunk = all_chunks * rank >> parts_log2;
  const int chunks = (all_chunks * (rank + 1) >> parts_log2) - first_chunk;
  const int steps = (chunks + 1) / kBitMmaChunks;
  const int first_k = first_chunk * kPerChunk;
  const int end_k = min(first_k + chunks * kPerChunk, args.K);

  const int owned = (tiles - rank + parts - 1) >> parts_log2;
  // A warp prepares a step of kTogether tokens at a time, always the same tokens.
  const int first_token = warp % kPairs * kTogether;
  const bool prepares = first_token < tokens;
  float v[kTogether][kPerLane];
  float plain[kTogether] = {};
  Run<kPerLane, T> x[kTogether];
  Run<kPerLane, float> scale, shift;  // of 1-bit weights only
  const auto load = [&](int task, int from, int end) {
    const int k = from + task / kPairs * kPerStep + lane * kPerLane;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const T* row = static_cast<const T*>(args.x) + int64_t(min(first_token + j, tokens - 1)) * args.K;
      x[j].load(row, k, end, args.vector_x);
    }
    if (F::kPerWord == kSignsPerWord && args.scale) scale.load(args.scale, k, end, args.vector_x);
    if (F::kPerWord == kSignsPerWord && args.shift) shift.load(args.shift, k, end, args.vector_x);
  };
  const auto prefetch = [&](int task, int from, int end) {
    const int k = from + task / kPairs * kPerStep + lane * kPerLane;
    if (k >= end) return;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      prefetch_to_l2(static_cast<const T*>(args.x) + int64_t(min(first_token + j, tokens - 1)) * args.K + k);
    }
    if (F::kPerWord == kSignsPerWord && args.scale) prefetch_to_l2(args.scale + k);
    if (F::kPerWord == kSignsPerWord && args.shift) prefetch_to_l2(args.shift + k);
  };
  const auto scale_loaded = [&] {
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        v[j][i] = to_float(x[j].e[i]);
        if (F::kPerWord == kSignsPerWord)
          plain[j] = args.shift ? fmaf(v[j][i], shift.e[i], plain[j]) : plain[j] + v[j][i];
        if (F::kPerWord == kSignsPerWord && args.scale) v[j][i] *= scale.e[i];
      }
    }
  };
  // int8 has one step for the whole token, so every block looks at all of it.
  const int measured_from = F::kInteger ? 0 : first_k;
  const int measured_end = F::kInteger ? args.K : end_k;
  const int measured = F::kInteger ? (all_chunks + 1) / kBitMmaChunks * kPairs : steps * kPairs;

  // A warpgroup takes every fourth tile; lanes of a warp copy eight rows times four chunks at once.
  int next_tile = group;
  int next_chunk = 0;
  int next_stage = 0;
  const int row_of_lane = warp % 4 * kMmaRows + lane % 8;
  const int chunk_of_lane = lane / 8;
  uint8_t* ring = weights + group * (kFusedStages * kStageBytes);
  const auto fetch = [&] {
    if (next_tile < tiles) {
      uint8_t* to = ring + next_stage * kStageBytes + chunk_of_lane * kWeightPitch + row_of_lane * 16;
      const int64_t row = first_row + next_tile * kBitMmaRows + row_of_lane;
      const int chunk = next_chunk + chunk_of_lane;
      const uint32_t* from[2];  // rows eight apart, and of each two chunks, four apart
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        from[h] = args.packed + min(row + 8 * h, args.e.columns - 1) * args.words + (first_chunk + chunk) * kChunkWords;
      }
      if (args.vector_w) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = i / 2 * 4;
          if (chunk + c < chunks) copy_async(to + c * kWeightPitch + i % 2 * 128, from[i % 2] + c * kChunkWords);
        }
      } else {
        // Nothing is written past the end of a row, where activations are zero.
        const int left = min(chunks * kChunkWords, args.words - first_chunk * kChunkWords) - chunk * kChunkWords;
#pragma unroll 1
        for (int j = 0; j < kChunkWords; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int c = i / 2 * 4;
            if (c * kChunkWords + j < left) {
              copy_word_async(to + c * kWeightPitch + i % 2 * 128 + 4 * j, from[i % 2] + c * kChunkWords + j);
            }
          }
        }
      }
      next_chunk += kStageChunks;
      if (next_chunk >= chunks) {
        next_chunk = 0;
        next_tile += kFusedGroups;
      }
      next_stage = (next_stage + 1) % kFusedStages;
    }
    commit_copies();
  };

  int task = warp;
  if (task < measured && prepares) load(task, measured_from, measured_end);
  if (threadIdx.x == 0) {
    const int values = owned * kBitMmaRows + (args.has_plain ? 1 : 0);
    expect_bytes(&arrived, values * tokens * parts * static_cast<int>(sizeof(float)));
  }
  __syncwarp();
  if (parts > 1) arrive_at_cluster();
#pragma unroll 1
  for (int i = 0; i < kFusedStages - 1; ++i) fetch();
  if (prepares) {
#pragma unroll 1
    for (int later = task + kFusedWarps; later < measured; later += kFusedWarps)
      prefetch(later, measured_from, measured_end);
  }

  // Needed last, and as far away as the rest.
  const auto row_of = [&](int i) {
    return first_row + int64_t((i / (kBitMmaRows * kTokens) << parts_log2) + rank) * kBitMmaRows + i % kBitMmaRows;
  };
  const int outputs = owned * (kTokens * kBitMmaRows);
  Column column{};
  if (static_cast<int>(threadIdx.x) < outputs && row_of(threadIdx.x) < args.e.columns) {
    column = column_of(args.e, row_of(threadIdx.x));
  }
  if (parts > 1) wait_for_cluster();
  if (threadIdx.x < kTokens) most_of_token[threadIdx.x] = 0;
  if (threadIdx.x < kTokens * kLimbs) sum_of_token[threadIdx.x] = 0;
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
      plain_of_lane[j][threadIdx.x] = plain[j];
    }
  }
  __syncthreads();
  if (prepares) {
    const int last = steps * kPairs - 1 - warp;
    bool again = F::kInteger;
    float per_unit[kTogether];
    int sums[kTogether][kLimbs] = {};
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
            sums[j][0] += static_cast<int>(q << 16) >> 16;
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
        const int of_warp = __reduce_add_sync(0xffffffff, sums[j][l]);
        if (lane == 0) atomicAdd(&sum_of_token[(first_token + j) * kLimbs + l], of_warp);
      }
    }
  }
  show_to_tensor_cores();
  __syncthreads();

  // The last warps, which are the first to run out of tiles, tell every block of the cluster.
  const int plain_token = kFusedWarps - 1 - warp;
  if (args.has_plain && plain_token < tokens) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kFusedWarps / kPairs; ++i) {
      sum += plain_of_lane[plain_token % kTogether][(i * kPairs + plain_token / kTogether) * 32 + lane];
    }
    sum = warp_reduce(sum, Sum());
    if (lane < parts) send(&plain_of_part[rank * kTokens + plain_token], &arrived, lane, parts, __float_as_uint(sum));
  }

  int stage = 0;
#pragma unroll 1
  for (int tile = group; tile < tiles; tile += kFusedGroups) {
    int c[kProducts][kBlocksOfColumns][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk += kStageChunks) {
      wait_for_copies<kFusedStages - 2>();
      show_to_tensor_cores();
      warpgroup_barrier(group);
      fetch();  // to where the stage before this one was
      const uint64_t a = bit_operand(ring + stage * kStageBytes, kWeightPitch);
      const uint64_t b = bit_operand(planes + chunk * kPlanePitch, kPlanePitch);
#pragma unroll
      for (int s = 0; s < kStageChunks / kBitMmaChunks; ++s) {
        if (chunk + s * kBitMmaChunks < chunks) {
          begin_bit_mma();
#pragma unroll
          for (int p = 0; p < kProducts; ++p) {
            bit_mma(c[p], a + (s * kBitMmaChunks * kWeightPitch >> 4),
                    b + (s * kBitMmaChunks * kPlanePitch + p * 64 * 16 >> 4));
          }
          end_bit_mma();
        }
      }
      wait_for_bit_mma();
      stage = (stage + 1) % kFusedStages;
    }

    const int t = lane % 4;
    const int owner = tile & (parts - 1);
    float* to = partial + (((tile >> parts_log2) << parts_log2) + rank) * (kTokens * kBitMmaRows) +
                warp % 4 * kMmaRows + lane / 4;
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (m >= tokens) break;
      const float absmax = __uint_as_float(most_of_token[m]);
      // Fixed point has no infinities: a token that holds one, or NaN, gives NaN.
      const float unit = absmax <= FLT_MAX ? power_of_two(step_exponent<Format::kBits>(absmax)) : NAN;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int sum[kLimbs];
#pragma unroll
        for (int l = 0; l < kLimbs; ++l) {
          const int block = (m * kLimbs + l) * 2;
          const int (&low)[4] = c[block / kBlocksOfColumns][block % kBlocksOfColumns];
          const int (&high)[4] = c[block / kBlocksOfColumns][block % kBlocksOfColumns + 1];
          const int top = l == kLimbs - 1 && t == 3 ? -512 : 512;
          sum[l] = low[2 * h] + 2 * low[2 * h + 1] + 256 * high[2 * h] + top * high[2 * h + 1] << 2 * t;
          sum[l] += __shfl_xor_sync(0xffffffff, sum[l], 1);
          sum[l] += __shfl_xor_sync(0xffffffff, sum[l], 2);
          sum[l] = F::kStep * sum[l] - sum_of_token[m * kLimbs + l];
        }
        uint32_t value;
        if constexpr (F::kInteger) {
          value = static_cast<uint32_t>(sum[0]);
        } else {
          float f = static_cast<float>(sum[0]);
          if constexpr (kLimbs == 2) f = fmaf(static_cast<float>(sum[1]), 65536.0f, f);
          value = __float_as_uint(f * unit);
        }
        if (t == (2 * m + h) % 4) send(to + m * kBitMmaRows + 8 * h, &arrived, owner, parts, value);
      }
    }
  }
  if (parts == 1) {
    __syncthreads();
  } else {
    wait_for_bytes(&arrived);
  }

#pragma unroll 1
  for (int i = threadIdx.x; i < outputs; i += kFusedThreads) {
    const int64_t n = row_of(i);
    const int m = i / kBitMmaRows % kTokens;
    if (m >= tokens || n >= args.e.columns) continue;
    if (i >= kFusedThreads) column = column_of(args.e, n);
    const float* from =
        partial + (i / (kBitMmaRows * kTokens) << parts_log2) * (kTokens * kBitMmaRows) + i % (kBitMmaRows * kTokens);
    float y;
    if constexpr (F::kInteger) {
      int sum = 0;
#pragma unroll 1
      for (int p = 0; p < parts; ++p) sum += __float_as_int(from[p * (kTokens * kBitMmaRows)]);
      y = finish(args.e, Token{int8_scale(__uint_as_float(most_of_token[m])), 0.0f, 0.0f}, column, sum);
    } else {
      float sum = 0.0f;
      float plain_sum = 0.0f;
#pragma unroll 1
      for (int p = 0; p < parts; ++p) {
        sum += from[p * (kTokens * kBitMmaRows)];
        if (args.has_plain) plain_sum += plain_of_part[p * kTokens + m];
      }
      y = finish(args.e, Token{1.0f, 0.0f, plain_sum}, column, sum);
    }
    static_cast<T*>(args.e.out)[m * args.e.columns + n] = from_float<T>(y);
  }
#endif
}

template <typename F, typename T>
constexpr int kMostFusedTokens = 128 / FusedFormat<F, T>::kPlanes;

struct FusedPlan {
  int64_t tiles, clusters;
  int parts_log2;
  size_t plane_bytes, shared_bytes;
  bool fits;
};

// Clusters of 1, 2, 4 and 8 blocks that the card runs at once, a block having a processor to itself. Processors come in
// groups whose sizes differ from card to card, so that not all of them may find a place in a cluster of 4 or 8.
template <typename... Params>
int clusters_at_once(void (*kernel)(Params...), int parts_log2) {
  static const std::array<int, 4> known = [&] {
    const int shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / 2 + 1024;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    std::array<int, 4> clusters{device_attribute(cudaDevAttrMultiProcessorCount)};
    for (int i = 1; i < 4; ++i) {
      cudaLaunchAttribute attribute = {};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {1u << i, 1, 1};
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(clusters[0] >> i << i);
      config.blockDim = dim3(kFusedThreads);
      config.dynamicSmemBytes = shared;
      config.attrs = &attribute;
      config.numAttrs = 1;
      check(cudaOccupancyMaxActiveClusters(&clusters[i], kernel, &config));
    }
    return clusters;
  }();
  return known[parts_log2];
}

template <typename F, typename T, int kColumns>
FusedPlan fused_plan(int64_t N, int64_t chunks, int parts_log2) {
  FusedPlan p;
  p.parts_log2 = parts_log2;
  p.tiles = ceil_div(N, kBitMmaRows);
  const int64_t at_once = clusters_at_once(fused_kernel<F, T, kColumns>, parts_log2);
  const int64_t wanted = at_once * ceil_div(p.tiles, at_once * kMostFusedTiles);
  p.clusters = p.tiles < wanted ? p.tiles : wanted;
  const int64_t part = ceil_div(chunks, int64_t(1) << parts_log2);
  p.plane_bytes = size_t(ceil_div(part, kBitMmaChunks)) * kBitMmaChunks * plane_pitch(kColumns);
  const int64_t partials = ceil_div(ceil_div(p.tiles, p.clusters), int64_t(1) << parts_log2) << parts_log2;
  p.shared_bytes = kRingBytes + p.plane_bytes +
                   size_t(partials) * kBitMmaRows * sizeof(float) * (kColumns / FusedFormat<F, T>::kPlanes);
  constexpr size_t kStatic = 8192;  // room for the kernel's own shared variables
  p.fits = part * kChunkWords * F::kPerWord <= kMostFusedPart &&
           p.shared_bytes + kStatic <= size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  return p;
}

template <typename F, typename T, int kColumns>
void run_fused(const TokenSource& s, const Weights& w, const Epilogue& e, const FusedPlan& p, cudaStream_t stream) {
  constexpr int kRun = FusedFormat<F, T>::kPerLane;
  constexpr size_t kRunBytes = kRun * sizeof(T) < 16 ? kRun * sizeof(T) : 16;
  FusedArgs args;
  args.x = s.x;
  args.scale = s.scale;
  args.shift = s.shift;
  args.packed = w.packed;
  args.e = e;
  args.K = static_cast<int>(s.K);
  args.words = static_cast<int>(w.words);
  args.tokens = static_cast<int>(s.M);
  args.tiles = static_cast<int>(p.tiles / p.clusters);
  args.extra = static_cast<int>(p.tiles % p.clusters);
  args.parts_log2 = p.parts_log2;
  args.plane_bytes = static_cast<int>(p.plane_bytes);
  args.has_plain = s.has_plain;
  args.vector_x = s.K % kRun == 0 && aligned(s.x, kRunBytes) && aligned(s.scale, 16) && aligned(s.shift, 16);
  args.vector_w = w.vector;
  Grid grid{dim3(static_cast<unsigned>(p.clusters << p.parts_log2)), kFusedThreads, p.shared_bytes};
  grid.cluster = 1 << p.parts_log2;
  launch(fused_kernel<F, T, kColumns>, grid, stream, args);
}

// Calls f with the number of columns, a constant.
template <typename F, typename T, typename Function>
auto with_fused_columns(int64_t tokens, Function&& f) {
  constexpr int kPlanes = FusedFormat<F, T>::kPlanes;
  if constexpr (kPlanes <= 16) {
    if (tokens == 1) return f(std::integral_constant<int, 16>());
  }
  return tokens * kPlanes <= 64 ? f(std::integral_constant<int, 64>()) : f(std::integral_constant<int, 128>());
}

// Blocks of a cluster. More of them have less of the activations to prepare, and more to add up; few rows of weights
// leave processors idle otherwise. Then as many as it takes for the activations to fit in shared memory.
template <typename F, typename T, int kColumns>
FusedPlan choose_fused(int64_t tokens, int64_t N, int64_t chunks) {
  constexpr int64_t kFewTiles = 64;
  const int64_t tiles = ceil_div(N, kBitMmaRows);
  int parts_log2 = tiles <= kFewTiles ? 3 : tokens == 1 ? 1 : 2;
  FusedPlan p = fused_plan<F, T, kColumns>(N, chunks, parts_log2);
  while (!p.fits && ++parts_log2 <= kMostFusedPartsLog2) p = fused_plan<F, T, kColumns>(N, chunks, parts_log2);
  return p;
}

template <typename F, typename T>
bool fused_applies(const TokenSource& s, const Weights& w) {
  const int64_t tokens = s.M < kMostFusedTokens<F, T> ? s.M : kMostFusedTokens<F, T>;
  return with_fused_columns<F, T>(tokens, [&](auto columns) {
    return choose_fused<F, T, columns>(tokens, w.rows, ceil_div(w.words, kChunkWords)).fits;
  });
}

// The instructions exist in compute capability 9.0 alone, and in code built for 9.0a.
template <typename F>
bool fused_applies(const TokenSource& s, const Weights& w) {
#ifdef BITKERNELS_SM90A
  if (s.M > kMostTokens || device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) return false;
  bool applies = false;
  dispatch_float(s.dtype, [&](auto t) { applies = fused_applies<F, decltype(t)>(s, w); });
  return applies;
#else
  return false;
#endif
}

template <typename F>
void run_fused(const TokenSource& source, const Weights& w, const Epilogue& epilogue, cudaStream_t stream) {
  dispatch_float(source.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t m = 0; m < source.M; m += kMostFusedTokens<F, T>) {
      TokenSource s = source;
      Epilogue e = epilogue;
      s.x = static_cast<const T*>(source.x) + m * source.K;
      s.M = source.M - m < kMostFusedTokens<F, T> ? source.M - m : kMostFusedTokens<F, T>;
      e.out = static_cast<T*>(epilogue.out) + m * epilogue.columns;
      with_fused_columns<F, T>(s.M, [&](auto columns) {
        run_fused<F, T, columns>(s, w, e, choose_fused<F, T, columns>(s.M, w.rows, ceil_div(w.words, kChunkWords)),
                                 stream);
      });
    }
  });
}

}  // namespace bitkernels::cuda
