// More than a few tokens, on Hopper: a block makes 64, 128 or 192 rows of the weights times 16 to 256 tokens.
//
// Weights are the register operand of wgmma, decoded on the way; activations are the other operand, untouched:
// the copy engine brings them from the caller's tensor into swizzled shared memory. So nothing is prepared. One
// warpgroup fetches activations and words, the others multiply: they split the rows of the tile, and where there are
// few tokens also K, and add up in shared memory in a fixed order. Where there are fewer tiles than processors, the
// blocks of a cluster split K as well, or tiles are cut between blocks, as are those of a last round that would leave
// processors idle (WarpgroupWork).
//
// Scales that follow the columns are tabulated once a block as the two values a weight may take, and a bit chooses.
// Products of pairs of columns (PairOperand) are the exception: a kernel before makes their activations, scaled.
#pragma once

#include <type_traits>

#include "warpgroup_tile.cuh"
#include "wgmma.cuh"

namespace bitkernels::cuda {

// Sums to outputs.
struct RowScalars {
  float scale, shift, bias;
};

// Whose turn it is when blocks of eight tokens go round the parts.
struct Turn {
  int owner = 0, round = 0;
  __device__ void next(int all) {
    if (++owner == all) *this = {0, round + 1};
  }
};

__device__ inline float finish_row(const RowScalars& r, float sum) { return fmaf(sum, r.scale, r.bias); }

// token: an Int8Token's words, what is added in the units of the activations and the unit.
__device__ inline float finish_pairs(const RowScalars& r, float sum, const uint32_t* token) {
  return fmaf(r.scale, sum * __uint_as_float(token[1]), fmaf(r.shift, __uint_as_float(token[0]), r.bias));
}

// Of a tile that is added to a residual in float32, a warpgroup's 64 columns pass through shared memory in parts, in
// boxes of 32 columns. The first parts of the residual come there while products run, and the sums leave as ordinary
// stores; the others are added by the copy engine, which is slower but has the time of the next tile for it. No element
// is in two tiles.
template <class Tile>
__device__ SharedAddress added_box(SharedAddress out, int part, int box) {
  return out + (part % Tile::kAddedHalves * 2 + box) * Tile::kAddedBytes;
}

template <class Tile>
__device__ void fetch_residual(const CUtensorMap& residual, SharedAddress out, int first_row, int first_token,
                               SharedAddress landed) {
  wait_for_stores_to_read();
  barrier_arrive_expecting(landed, Tile::kAddedHalves * 2 * Tile::kAddedBytes);
#pragma unroll
  for (int part = 0; part < Tile::kAddedHalves; ++part) {
#pragma unroll
    for (int box = 0; box < 2; ++box) {
      load_box(&residual, added_box<Tile>(out, part, box), landed, first_row + 32 * box,
               first_token + part * Tile::kAddedTokens);
    }
  }
}

template <class Tile, typename Finish>
__device__ void add_sums(const CUtensorMap& residual, SharedAddress out, int first_row, int first_token, int barrier,
                         int thread, Finish&& finish) {
  const int lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  // A lane has columns g and g + 8 of its warp's sixteen, of tokens 2t and 2t + 1 of every eight.
  SharedAddress places[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int column = warp % 2 * 16 + c / 2 * 8 + g, token = 2 * t + c % 2;
    places[c] = added_box<Tile>(out, 0, warp / 2) + token * kBoxBytes + (column / 4 ^ token) * 16 + column % 4 * 4;
  }
#pragma unroll
  for (int part = 0; part < 2 * Tile::kAddedHalves; ++part) {
    const bool fetched = part < Tile::kAddedHalves;
    const int half = part % Tile::kAddedHalves * 2 * Tile::kAddedBytes;
    if (!fetched && thread == 0) wait_for_stores_to_read<Tile::kAddedHalves - 1>();
    named_barrier(barrier, kWarpgroup);
#pragma unroll
    for (int i = 0; i < Tile::kAddedTokens / 8; ++i) {
      float y[4];
      finish(part * (Tile::kAddedTokens / 8) + i, y);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const SharedAddress to = places[c] + half + i * 8 * kBoxBytes;
        store_float(to, fetched ? load_float(to) + y[c] : y[c]);
      }
    }
    copy_engine_fence();
    named_barrier(barrier, kWarpgroup);
    if (thread == 0) {
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        const int row = first_row + 32 * box, token = first_token + part * Tile::kAddedTokens;
        fetched ? store_box(&residual, added_box<Tile>(out, part, box), row, token)
                : add_box(&residual, added_box<Tile>(out, part, box), row, token);
      }
      commit_stores();
    }
  }
}

// kCluster: the blocks of a cluster make a tile. Blocks that are alone carry no code for it. Out: of y, or float, and
// then sums times their tokens' scales are added to a residual.
template <class F, ScalesOf kScales, class Tile, typename Out, bool kCluster>
__device__ void consume(const CUtensorMap& output, const WarpgroupProblem& p, SharedAddress stages, int slots,
                        SharedAddress out, SharedAddress tokens, SharedAddress parts, SharedAddress scales,
                        SharedAddress full, SharedAddress empty, SharedAddress received, int group, int rank,
                        int blocks, int cluster, int clusters) {
  using Layout = WarpgroupLayout<F, Tile>;
  using Accumulator = typename F::Accumulator;
  constexpr bool kColumnScales = kScales == ScalesOf::kColumns;
  constexpr bool kInteger = std::is_same_v<Accumulator, int>;
  constexpr bool kAdds = std::is_same_v<Out, float>;
  constexpr bool kPairs = std::is_same_v<F, PairOperand>;
  constexpr bool kTokenScales = kInteger || kAdds || kPairs;
  constexpr int kTokensOfThread = (Tile::kTokens + kWarpgroup - 1) / kWarpgroup;
  const int row_group = Tile::kRowGroups == 1 ? 0 : Tile::kSplit == 1 ? group : group % Tile::kRowGroups;
  const int split = Tile::kSplit == 1 ? 0 : group / Tile::kRowGroups;
  const int thread = threadIdx.x % kWarpgroup;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const F operand(t);
  const int all_stages = static_cast<int>(ceil_div(p.K, Layout::kDepth));
  constexpr bool kCuts = Tile::kCuts && !kCluster;
  WarpgroupWork<kCuts, kAdds> work(p, all_stages, rank, blocks, cluster, clusters);
  bool more = work.next();
  // All blocks run at once, so the next kernel takes nothing from them.
  wait_for_previous_kernel();
  let_next_kernel_start();
  constexpr int kConsumerThreads = kWarpgroup * Tile::kConsumers;
  if constexpr (kColumnScales) {
    tabulate_scales<typename F::T, kConsumerThreads>(p, work.first_stage() * Layout::kDepth,
                                                     work.last_stage() * Layout::kDepth, scales, threadIdx.x);
    named_barrier(1, kConsumerThreads);
  }

  // What the next steps consume besides activations. Words are fetched for all steps of a box.
  constexpr int kStepsOfBox = kBoxBytes / kStepBytes;
  constexpr int kWordsOfBox = F::kWords * kStepsOfBox;
  constexpr int kTogether = Layout::kTogether;
  struct Steps {
    uint32_t upper[kStepsOfBox][F::kWords], lower[kStepsOfBox][F::kWords];
    uint32_t columns[kTogether][kColumnScales ? 2 : 1][4];
  };
  const SharedAddress my_words =
      Tile::kActivationBytes +
      ((row_group * kWarpgroupRows + warp * 16 + g) * Layout::kWordsOfRow + split * kWordsOfBox) * 4;
  constexpr int kScaleStep = 128;  // bytes
  constexpr int kScaleStage = Tile::kBoxes * kStepsOfBox * kScaleStep;
  const auto fetch_box = [&](SharedAddress from, uint32_t (&words)[kStepsOfBox][F::kWords]) {
    constexpr int kVector = std::min(kWordsOfBox, 4);
#pragma unroll
    for (int i = 0; i < kWordsOfBox; i += kVector) {
      load_words(from + 4 * i, reinterpret_cast<uint32_t (&)[kVector]>(words[i / F::kWords][i % F::kWords]));
    }
  };
  const auto fetch = [&](SharedAddress stage, SharedAddress my_scales, int first, Steps& next) {
#pragma unroll
    for (int i = first; i < first + kTogether; ++i) {
      const int at = i / kStepsOfBox * Tile::kSplit * kStepsOfBox + i % kStepsOfBox;
      if (i % kStepsOfBox == 0) {
        const SharedAddress words = my_words + stage + at * F::kWords * 4;
        fetch_box(words, next.upper);
        fetch_box(words + 8 * Layout::kWordsOfRow * 4, next.lower);
      }
      if constexpr (kColumnScales) {
        load_words(my_scales + at * kScaleStep, next.columns[i - first][0]);
        load_words(my_scales + at * kScaleStep + kScaleStep / 2, next.columns[i - first][1]);
      }
    }
  };

  const uint64_t first_operand = wgmma_descriptor(stages + split * Tile::kBoxSize);

  int slot = 0;
  int parity = 0;
  [[maybe_unused]] int residual_parity = 0;
  SharedAddress stage = stages;
  const auto advance = [&] {
    stage += Layout::kStageBytes;
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
      stage = stages;
    }
  };
  for (; more; more = work.next()) {
    const int count = work.end - work.begin;
    const int64_t first_row = int64_t(work.row_tile) * Tile::kRows + row_group * kWarpgroupRows;
    const int token = work.token_tile * Tile::kTokens;
    SharedAddress my_scales = scales + work.begin * kScaleStage + split * kStepsOfBox * kScaleStep + t * 16;
    const int64_t row = first_row + warp * 16 + g;
    Values rows[2] = {};
    RowScalars scalars[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = min(row + 8 * h, p.rows - 1);
      if constexpr (kScales == ScalesOf::kRows) {
        const float alpha = p.alpha[n * p.scale_stride];
        const float beta = p.beta[n * p.scale_stride];
        rows[h] = values_of<typename F::T>(alpha, beta, alpha, beta);
      }
      const float bias = p.bias ? p.bias[n] : -0.0f;  // added to a sum, -0 leaves it as it is
      if constexpr (kPairs) {
        scalars[h] = {p.alpha ? p.alpha[n * p.scale_stride] : 1.0f, p.beta ? p.beta[n * p.scale_stride] : 1.0f, bias};
      } else {
        scalars[h] = {kScales == ScalesOf::kNothing ? *p.alpha : 1.0f, 0.0f, bias};
      }
    }

    [[maybe_unused]] Int8Token of_tokens[kTokensOfThread];
    if constexpr (kTokenScales) {
#pragma unroll
      for (int j = 0; j < kTokensOfThread; ++j) {
        of_tokens[j] = p.tokens[min(int64_t(token + j * kWarpgroup + thread), p.M - 1)];
      }
    }

    Accumulator sums[Tile::kTokens / 2];
    typename F::Left a[2][kTogether];
    Steps next;
    if (count > 0) {
      barrier_wait(full + 8 * slot, parity);
      fetch(stage, my_scales, 0, next);
    }
    for (int s = 0; s < count; ++s) {
      const SharedAddress now = stage;
      const uint64_t in_stage = first_operand + ((now - stages) >> 4);
      const int last_slot = slot == 0 ? slots - 1 : slot - 1;
      advance();
#pragma unroll
      for (int first = 0; first < Layout::kSteps; first += kTogether) {
        typename F::Left(&operands)[kTogether] = a[first / kTogether % 2];
        if constexpr (kPairs) {
          operand.decode(next.upper, next.lower, operands);
        } else {
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            const uint32_t (&upper)[F::kWords] = next.upper[(first + i) % kStepsOfBox];
            const uint32_t (&lower)[F::kWords] = next.lower[(first + i) % kStepsOfBox];
            if constexpr (kColumnScales) {
              const auto of_column = [&](int k, int) {
                return Values{next.columns[i][k / 2][k % 2 * 2], next.columns[i][k / 2][k % 2 * 2 + 1]};
              };
              operand.decode(upper, lower, of_column, operands[i]);
            } else if constexpr (kScales == ScalesOf::kRows) {
              operand.decode(upper, lower, [&](int, int h) { return rows[h]; }, operands[i]);
            } else {
              operand.decode(upper, lower, operands[i]);
            }
          }
        }
        const auto fetch_next = [&] {
          if (first + kTogether < Layout::kSteps) {
            fetch(now, my_scales, first + kTogether, next);
          } else if (s + 1 < count) {
            barrier_wait(full + 8 * slot, parity);
            my_scales += kScaleStage;
            fetch(stage, my_scales, 0, next);
          }
        };
        // Before several products, because a warp stands still at each until the tensor cores take it.
        if constexpr (kTogether > 1) fetch_next();
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int step = first + i;
          const int at = step / kStepsOfBox * Tile::kSplit * Tile::kBoxSize + step % kStepsOfBox * kStepBytes;
          const uint64_t b = in_stage + at / 16;
          F::multiply(sums, operands[i], b, s > 0 || step > 0, i);
        }
        wgmma_commit();
        if constexpr (kTogether == 1) fetch_next();
        // The products before have ended: their registers may be written, and their stage, if it was another, is free.
        wgmma_wait<1>();
        if (first == 0 && s > 0 && thread == 0) barrier_arrive(empty + 8 * last_slot);
      }
      if constexpr (kAdds) {
        if (s == count / 2 && thread == 0 && !work.leaves()) {
          fetch_residual<Tile>(output, out + row_group * Tile::kBoxSize, static_cast<int>(first_row), token,
                               received + 8 * group);
        }
      }
    }
    wgmma_wait<0>();
    pin(sums);
    if (count > 0 && thread == 0) barrier_arrive(empty + 8 * (slot == 0 ? slots - 1 : slot - 1));
    if (count == 0) {
#pragma unroll
      for (int i = 0; i < Tile::kTokens / 2; ++i) sums[i] = 0;
    }

    // Part q of all finishes blocks q, q + all, ... of eight tokens, and adds the others' sums in their order.
    const int all = blocks * Tile::kSplit;
    const int part = rank * Tile::kSplit + split;
    if constexpr (kCluster || Tile::kSplit > 1) {
      // [round][row group][split][part, less the owner][thread]
      const auto place = [&](int owner_split, int round, int from, int owner) {
        const int sender = from - (from > owner);
        return parts +
               (((round * Tile::kRowGroups + row_group) * Tile::kSplit + owner_split) * (all - 1) + sender) *
                   Tile::kFragmentBytes +
               thread * 16;
      };
      // Alone, the warpgroups wait for each other: for the readers of the tile before, and for the senders.
      if constexpr (!kCluster) named_barrier(1, kConsumerThreads);
      int owned = 0;
      Turn turn;
#pragma unroll
      for (int i = 0; i < Tile::kBlocksOfEight; ++i, turn.next(all)) {
        if (turn.owner == part) {
          ++owned;
          continue;
        }
        const int owner_split = turn.owner % Tile::kSplit;
        const SharedAddress to = place(owner_split, turn.round, part, turn.owner);
        if constexpr (kCluster) {
          const int owner_rank = turn.owner / Tile::kSplit;
          send(in_block(to, owner_rank), sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3],
               in_block(received + 8 * (owner_split * Tile::kRowGroups + row_group), owner_rank));
        } else {
          store_sums(to, sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
        }
      }
      // In a cluster each warpgroup has a barrier that counts what it is sent.
      if constexpr (kCluster) {
        const SharedAddress mine = received + 8 * group;
        if (thread == 0) barrier_arrive_expecting(mine, owned * (all - 1) * Tile::kFragmentBytes);
        barrier_wait(mine, 0);
      } else {
        named_barrier(1, kConsumerThreads);
      }
      turn = {};
#pragma unroll
      for (int i = 0; i < Tile::kBlocksOfEight; ++i, turn.next(all)) {
        if (turn.owner != part) continue;
        // In the order of the parts, whoever adds, so that a token's bits do not depend on its place. Its own part
        // waits where the first was.
#pragma unroll 1
        for (int from = part == 0 ? 1 : 0; from < all; ++from) {
          const SharedAddress at = place(split, turn.round, from == part ? 0 : from, part);
          Accumulator v[4];
          load_sums(at, v);
          if (from == 0) store_sums(at, sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[4 * i + c] = from == 0 ? v[c] : sums[4 * i + c] + v[c];
        }
      }
    }

    const int barrier = 1 + group + 1;
    if constexpr (kCuts) {
      if (work.leaves()) {
        const int place = work.next_place();
        uint4* partial = p.partials + (int64_t(place) * Tile::kPartialBytes + row_group * Tile::kFragmentBytes) / 16;
#pragma unroll
        for (int i = 0; i < Tile::kBlocksOfEight; ++i) {
          if (i % all != part) continue;
          store_sums(partial + i * (Tile::kPartialBlock / 16) + thread, sums[4 * i], sums[4 * i + 1], sums[4 * i + 2],
                     sums[4 * i + 3]);
        }
        arrive_at_named_barrier(Tile::kLeftBarrier, kConsumerThreads + 32);
        continue;
      }
#pragma unroll 1
      for (int other = 0; other < work.others(); ++other) {
#pragma unroll
        for (int first = 0; first < Tile::kBlocksOfEight; first += Tile::kBlocksOfStage) {
          barrier_wait(full + 8 * slot, parity);
#pragma unroll
          for (int i = first; i < first + Tile::kBlocksOfStage; ++i) {
            if (i >= Tile::kBlocksOfEight || i % all != part) continue;
            Accumulator v[4];
            load_sums(stage + (i - first) * Tile::kPartialBlock + row_group * Tile::kFragmentBytes + thread * 16, v);
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[4 * i + c] += v[c];
          }
          named_barrier(barrier, kWarpgroup);
          if (thread == 0) barrier_arrive(empty + 8 * slot);
          advance();
        }
      }
    }

    // Through shared memory to rows of y. Threads that share a box wait for each other.
    const bool whole = all == 1;
    const SharedAddress box = out + row_group * Tile::kBoxSize;
    const SharedAddress my_tokens = tokens + group * Tile::kTokens * int(sizeof(Int8Token));
    if constexpr (kTokenScales) {
#pragma unroll
      for (int j = 0; j < kTokensOfThread; ++j) {
        const int i = j * kWarpgroup + thread;
        if (i < Tile::kTokens) {
          store_words(my_tokens + i * int(sizeof(Int8Token)), of_tokens[j].sum, __float_as_uint(of_tokens[j].scale));
        }
      }
    }
    if constexpr (kAdds) {
      static_assert(Tile::kSplit == 1 && !kCluster && Tile::kAddedTokens % 8 == 0);
      barrier_wait(received + 8 * group, residual_parity);
      residual_parity ^= 1;
      add_sums<Tile>(output, box, static_cast<int>(first_row), token, barrier, thread, [&](int i, float (&y)[4]) {
        uint32_t pair[4];  // of two tokens
        load_words(my_tokens + (8 * i + 2 * t) * int(sizeof(Int8Token)), pair);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if constexpr (kPairs) {
            y[c] = finish_pairs(scalars[c / 2], sums[4 * i + c], &pair[c % 2 * 2]);
          } else {
            y[c] = finish_row(scalars[c / 2], sums[4 * i + c] * __uint_as_float(pair[c % 2 * 2 + 1]));
          }
        }
      });
    } else {
      if (thread == 0) wait_for_stores_to_read();
      named_barrier(barrier, kWarpgroup);
      const SharedAddress to = box + lane % 8 * kBoxBytes + ((2 * warp + lane / 8 % 2) ^ (lane % 8)) * 16;
      Turn turn;
#pragma unroll
      for (int i = 0; i < Tile::kBlocksOfEight; ++i, turn.next(all)) {
        if (turn.owner != part) continue;
        float y[4];
        if constexpr (kInteger) {
          uint32_t pair[4];  // sum and scale of two tokens
          load_words(my_tokens + (8 * i + 2 * t) * int(sizeof(Int8Token)), pair);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int sum = sums[4 * i + c] - static_cast<int>(pair[c % 2 * 2]);
            y[c] = __fadd_rn(__fmul_rn(__int2float_rn(sum), __uint_as_float(pair[c % 2 * 2 + 1])), scalars[c / 2].bias);
          }
        } else if constexpr (kPairs) {
          uint32_t pair[4];
          load_words(my_tokens + (8 * i + 2 * t) * int(sizeof(Int8Token)), pair);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            y[c] = finish_pairs(scalars[c / 2], sums[4 * i + c], &pair[c % 2 * 2]);
          }
        } else {
#pragma unroll
          for (int c = 0; c < 4; ++c) y[c] = finish_row(scalars[c / 2], sums[4 * i + c]);
        }
        store_transposed(to + i * 8 * kBoxBytes, pack_pair(Out(), y[0], y[1]), pack_pair(Out(), y[2], y[3]));
      }
      copy_engine_fence();
      named_barrier(barrier, kWarpgroup);
      if (p.boxed_output) {
        if (thread == 0) {
          if (whole) {
            store_box(&output, box, static_cast<int>(first_row), token);
          } else {
            for (int i = part; i < Tile::kBlocksOfEight; i += all) {
              store_box(&output, box + i * 8 * kBoxBytes, static_cast<int>(first_row), token + 8 * i);
            }
          }
          commit_stores();
        }
      } else {
        for (int j = warp; j < Tile::kTokens; j += 4) {
          const int64_t m = token + j;
          if (j / 8 % all != part || m >= p.M) continue;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int column = 32 * h + lane;
            if (first_row + column >= p.rows) continue;
            uint16_t v;
            const SharedAddress from = box + j * kBoxBytes + (column / 8 ^ j % 8) * 16 + column % 8 * 2;
            asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from) : "memory");
            static_cast<uint16_t*>(p.y)[m * p.rows + first_row + column] = v;
          }
        }
      }
    }
  }
  if (thread == 0) wait_for_stores_to_read();
}

template <class F, ScalesOf kScales, class Tile, typename Out, bool kCluster>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    warpgroup_kernel(const __grid_constant__ CUtensorMap activations, const __grid_constant__ CUtensorMap output,
                     WarpgroupProblem p, WarpgroupLayout<F, Tile> layout, int cluster_blocks) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint4 shared[];
  const SharedAddress stages = (shared_address(shared) + 1023) & ~1023u;
  const SharedAddress full = stages + layout.barriers();
  const SharedAddress empty = full + 8 * layout.stages;
  const SharedAddress received = empty + 8 * layout.stages;
  // The same in all lanes, and known to be: what follows from it lives in uniform registers.
  const int group = uniform(threadIdx.x / kWarpgroup);
  const int blocks = kCluster ? cluster_blocks : 1;
  const int rank = kCluster ? cluster_rank() : 0;
  const int cluster = static_cast<int>(blockIdx.x) / blocks;
  const int clusters = static_cast<int>(gridDim.x) / blocks;

  if (threadIdx.x == kWarpgroup * Tile::kConsumers) {
    prefetch_map(&activations);
    for (int i = 0; i < layout.stages; ++i) {
      barrier_init(full + 8 * i, 1 + kWarpgroup);
      barrier_init(empty + 8 * i, Tile::kConsumers);
    }
    for (int i = 0; i < Tile::kConsumers; ++i) barrier_init(received + 8 * i, 1);
    barrier_init_fence();
  }
  // Whoever sends to another block knows that it has started.
  if constexpr (kCluster) wait_for_cluster();
  __syncthreads();
  if (group == Tile::kConsumers) {
    if constexpr (Tile::kUnequalRegisters) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Tile::kProducerRegisters));
    }
    constexpr bool kAdds = std::is_same_v<Out, float>;
    produce<F, kScales, Tile, kCluster, kAdds>(activations, output, p, stages, layout.stages, full, empty, rank, blocks,
                                               cluster, clusters);
  } else {
    if constexpr (Tile::kUnequalRegisters) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Tile::kConsumerRegisters));
    }
    consume<F, kScales, Tile, Out, kCluster>(
        output, p, stages, layout.stages, stages + layout.out(), stages + layout.tokens(), stages + layout.parts(),
        stages + layout.scales(), full, empty, received, group, rank, blocks, cluster, clusters);
  }
#endif
}

template <class F, ScalesOf kScales, class Tile, typename Out>
void run_warpgroup(const void* x, int64_t pitch, WarpgroupProblem p, int blocks, const Cut& cut, void* workspace,
                   cudaStream_t stream) {
  constexpr bool kAdds = std::is_same_v<Out, float>;
  const auto layout = warpgroup_layout<F, Tile>(kScales, p.K, blocks, kAdds);
  p.x = x;
  p.x_bytes = std::is_same_v<typename F::T, int8_t> ? 0 : p.M * pitch * int64_t(sizeof(typename F::T));
  p.row_tiles = static_cast<int>(ceil_div(p.rows, Tile::kRows));
  p.tiles = static_cast<int>(p.row_tiles * ceil_div(p.M, Tile::kTokens));
  p.boxed_output = p.rows % (16 / sizeof(Out)) == 0 && aligned(p.y, 16);
  const CUtensorMap activations = matrix_map<typename F::T>(x, p.M, pitch, Tile::kTokens);
  const CUtensorMap output = p.boxed_output ? matrix_map<Out>(p.y, p.M, p.rows,
                                                              kAdds                        ? Tile::kAddedTokens
                                                              : blocks * Tile::kSplit == 1 ? Tile::kTokens
                                                                                           : 8)
                                            : activations;
  // A cluster makes one tile, a block alone as many as it takes.
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int wanted = cut.tiles    ? processors
                     : blocks > 1 ? p.tiles * blocks
                                  : std::min(p.tiles, processors * Tile::kResident);
  p.cut = cut;
  p.partials = static_cast<uint4*>(workspace);
  p.filled = reinterpret_cast<uint64_t*>(static_cast<char*>(workspace) + int64_t(processors) * Tile::kPartialBytes);
  const Grid grid{dim3(static_cast<unsigned>(wanted)), Tile::kThreads, static_cast<size_t>(layout.bytes()), true,
                  blocks};
  const auto launch_form = [&](auto in_cluster) {
    launch(warpgroup_kernel<F, kScales, Tile, Out, in_cluster>, grid, stream, activations, output, p, layout, blocks);
  };
  if constexpr (Tile::kSplits) {
    if (blocks > 1) return launch_form(std::true_type());
  }
  launch_form(std::false_type());
}

}  // namespace bitkernels::cuda
