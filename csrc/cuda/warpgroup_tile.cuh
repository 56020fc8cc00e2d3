// The tiles of the warpgroup kernel, their place in shared memory, and the warpgroup that fills it.
#pragma once

#include <algorithm>

#include "epilogue.cuh"
#include "hopper.cuh"
#include "operand.cuh"
#include "weights.cuh"

namespace bitkernels::cuda {

constexpr int kWarpgroup = 128;     // threads
constexpr int kWarpgroupRows = 64;  // of wgmma
constexpr int kBoxBytes = 128;      // of a row of activations in shared memory: one swizzle
constexpr int kStepBytes = 64;      // of a row of activations: what one step of the loop consumes
constexpr int kMostCluster = 5;

enum class ScalesOf { kColumns, kRows, kNothing };

// Of a token that was quantised: the sum of its integers, and the weights' scale over its own. Of one that was made
// into pairs: the float that is added, as its bits, and the pairs' unit.
struct alignas(8) Int8Token {
  int sum;
  float scale;
};

// Tiles that would leave processors idle are cut: the last ones.
struct Cut {
  int tiles = 0;  // none: nothing is cut
  // Stages of K of each that its owner makes, a block for each, while other blocks help; 0: all blocks have equal
  // shares.
  int own = 0;
  int helpers_of_tile = 1;
  int tiles_of_helper = 1;  // one of these two is 1
};

struct WarpgroupProblem {
  const void* x;  // for its prefetch
  int64_t x_bytes;
  const uint32_t* w;   // [rows, words]
  const float* alpha;  // of columns or rows, by stride; ternary: [1]
  const float* beta;
  const float* bias;        // [rows] or null
  const Int8Token* tokens;  // of int8 activations, and of products that are added
  void* y;                  // [M, rows], or the residual that products are added to
  int64_t rows, words, M, K;
  int scale_stride;
  bool aligned_words;  // rows of the weights start on 16-byte boundaries
  bool boxed_output;   // rows of y start on 16-byte boundaries
  int row_tiles, tiles;
  Cut cut;
  uint4* partials;   // of cut tiles: Tile::kPartialBytes a block
  uint64_t* filled;  // a block: kFilled once its partial sums are there
};

// What partial sums of all blocks take of a workspace.
template <class Tile>
constexpr int64_t partial_bytes(int64_t processors) {
  return processors * int64_t(Tile::kPartialBytes + sizeof(uint64_t));
}

// Says that partial sums are there. Whoever reads it takes it away again, and no other 64 bits of a workspace that
// nobody cleared are likely to be the same.
constexpr uint64_t kFilled = 0xd1b54a32d192ed03;

template <int kTokens_, int kRowGroups_, int kSplit_, int kBoxes_, int kStages_, int kResident_>
struct WarpgroupTile {
  static constexpr int kTokens = kTokens_;
  static constexpr int kRowGroups = kRowGroups_;  // of 64 rows, a warpgroup each
  static constexpr int kSplit = kSplit_;          // of K, a warpgroup each
  static constexpr int kBoxes = kBoxes_;          // of 128 bytes of K in a stage
  static constexpr int kStages = kStages_;
  static constexpr int kResident = kResident_;  // blocks on a processor
  static constexpr int kRows = kRowGroups * kWarpgroupRows;
  static constexpr int kConsumers = kRowGroups * kSplit;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kBlocksOfEight = kTokens / 8;
  // Many sums need more registers than an equal share.
  static constexpr bool kUnequalRegisters = kTokens >= 128 && kConsumers != 3;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 72 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 216 : 112;

  static constexpr int kBoxSize = kTokens * kBoxBytes;
  static constexpr int kActivationBytes = kBoxes * kBoxSize;
  static constexpr int kOutBytes = kRowGroups * kBoxSize;
  // Sums that are added to a residual have 32 bits: they leave through that in turns, a part of the tokens at a time.
  static constexpr int kAddedHalves = 2;
  static constexpr int kAddedTokens = kTokens / (2 * kAddedHalves);
  static constexpr int kAddedBytes = kAddedTokens * kBoxBytes;
  static constexpr int kTokenBytes = kConsumers * kTokens * int(sizeof(Int8Token));
  // What the parts of a split K send to the part that finishes a block of eight tokens.
  static constexpr int kFragmentBytes = kWarpgroup * 4 * 4;
  static __host__ __device__ constexpr int part_bytes(int parts) {
    const int owned = (kBlocksOfEight + parts - 1) / parts;
    return parts > 1 ? kRowGroups * kSplit * owned * (parts - 1) * kFragmentBytes : 0;
  }
  // Wide tiles leave nothing to split, and their sums no room to be sent.
  static constexpr bool kSplits = kTokens <= 128 && kRowGroups < 3;

  // Of a tile that is cut, partial sums come through the stages, whole blocks of eight tokens in each.
  static constexpr bool kCuts = kResident == 1;
  static constexpr int kLeftBarrier = 2 + kConsumers;
  static constexpr int kPartialBlock = kRowGroups * kFragmentBytes;
  static constexpr int kPartialBytes = kBlocksOfEight * kPartialBlock;
  static constexpr int kBlocksOfStage = std::min(kBlocksOfEight, kActivationBytes / kPartialBlock);
};

template <class F, class Tile>
struct WarpgroupLayout {
  using T = typename F::T;
  static constexpr int kBox = kBoxBytes / sizeof(T);        // elements
  static constexpr int kDepth = Tile::kBoxes * kBox;        // of K in a stage
  static constexpr int kWordsOfRow = kDepth / F::kPerWord;  // in a stage
  static constexpr int kWordBytes = Tile::kRows * kWordsOfRow * 4;
  static constexpr int kStageBytes = (Tile::kActivationBytes + kWordBytes + 1023) / 1024 * 1024;
  static constexpr int kSteps = Tile::kBoxes * (kBoxBytes / kStepBytes) / Tile::kSplit;  // of a warpgroup in a stage
  // Steps whose operands are made together, and then their products. Two pay for signs, in stages of four, where there
  // are registers for their operands; pairs have one operand of two steps in common.
  static constexpr bool kSigns = F::kWords == 1;
  static constexpr bool kPairs = std::is_same_v<F, PairOperand>;
  static constexpr bool kHasTokens = kPairs || std::is_same_v<T, int8_t>;
  static constexpr int kTogether =
      kPairs || (kSigns && kSteps >= 4 && Tile::kConsumers == 2 && Tile::kResident == 1) ? 2 : 1;
  static_assert(kSteps % (2 * kTogether) == 0 && Tile::kBoxes % Tile::kSplit == 0);

  // Where things lie in shared memory, from its first multiple of 1024.
  int stages;
  int part_bytes;
  int64_t scale_bytes;
  __host__ __device__ int64_t out() const { return int64_t(stages) * kStageBytes; }
  __host__ __device__ int64_t tokens() const { return out() + Tile::kOutBytes; }
  __host__ __device__ int64_t parts() const { return tokens() + (kHasTokens ? Tile::kTokenBytes : 0); }
  __host__ __device__ int64_t scales() const { return parts() + part_bytes; }
  __host__ __device__ int64_t barriers() const { return scales() + scale_bytes; }
  __host__ __device__ int64_t bytes() const { return 1024 + barriers() + 8 * (2 * stages + Tile::kConsumers); }
};

// As many stages as fit beside the other blocks of a processor, or, where those would be fewer than kLeastStages, in a
// block that has it alone. Fewer than kLeastStages even so: the tile does not fit.
constexpr int kLeastStages = 3;
template <class F, class Tile>
WarpgroupLayout<F, Tile> warpgroup_layout(ScalesOf scales, int64_t K, int blocks, bool adds = false) {
  using Layout = WarpgroupLayout<F, Tile>;
  const int64_t alone = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t shared = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / Tile::kResident - 1024;
  const int64_t columns = scales == ScalesOf::kColumns ? ceil_div(K, Layout::kDepth) * Layout::kDepth : 0;
  // Sums that are added come from one part, and have tokens in the place of others.
  Layout layout{Tile::kStages, adds ? Tile::kTokenBytes : Tile::part_bytes(blocks * Tile::kSplit),
                columns / 2 * int64_t(sizeof(Values))};
  for (const int64_t most : {std::min(shared, alone), alone}) {
    layout.stages = Tile::kStages;
    while (layout.stages > 0 && layout.bytes() > most) --layout.stages;
    if (layout.stages >= kLeastStages) break;
  }
  return layout;
}

// What a block or a cluster makes: whole tiles, in turns; then its part of the tiles that are cut, a run of stages of
// K. The block that has the first stages of a cut tile finishes it: it adds the sums that others leave in their places.
// They leave theirs before it needs them, and it waits for blocks of lower indices only, which have started before it.
//
// kLeavesFirst: a block begins with what it leaves to another. So blocks are at different places of their tiles from
// then on, and do not all want memory for their outputs at once.
template <bool kCuts, bool kLeavesFirst>
class WarpgroupWork {
 public:
  int row_tile, token_tile;
  int begin, end;  // stages of K

  __device__ WarpgroupWork(const WarpgroupProblem& p, int stages, int rank, int blocks, int cluster, int clusters)
      : stages_(stages),
        row_tiles_(p.row_tiles),
        whole_(p.tiles - p.cut.tiles),
        clusters_(clusters),
        next_whole_(cluster),
        part_begin_(stages * rank / blocks),
        part_end_(stages * (rank + 1) / blocks) {
    const Cut& cut = p.cut;
    const int block = clusters - 1 - cluster;
    const int helper = block - cut.tiles;
    next_cut_ = whole_ + block;
    next_begin_ = first_ = 0;
    left_ = 0;
    last_ = stages;
    place_ = block;
    if (!kCuts || cut.tiles == 0) return;
    if (cut.own == 0) {  // the cut tiles end to end, in equal shares
      const int from = cut.tiles * stages * block / clusters;
      left_ = cut.tiles * stages * (block + 1) / clusters - from;
      next_cut_ = whole_ + from / stages;
      next_begin_ = from % stages;
    } else if (helper < 0) {
      left_ = last_ = part_end_ = cut.own;
    } else {
      place_ = helper * cut.tiles_of_helper;
      const int tail = stages - cut.own;
      const int of_tile = place_ / cut.helpers_of_tile;
      const int part = place_ % cut.helpers_of_tile;
      const int from = tail * part / cut.helpers_of_tile;
      first_ = cut.own;
      next_begin_ = part_begin_ = first_ + from;
      next_cut_ = whole_ + of_tile;
      left_ = cut.tiles_of_helper > 1 ? tail * min(cut.tiles_of_helper, cut.tiles - of_tile)
              : of_tile < cut.tiles   ? tail * (part + 1) / cut.helpers_of_tile - from
                                      : 0;
    }
    others_ = cut.own == 0 ? 1 : cut.helpers_of_tile;
    others_place_ = cut.own == 0 ? block + 1 : block * cut.helpers_of_tile;
  }

  __device__ bool next() {
    if (next_whole_ < whole_ && !(kLeavesFirst && next_begin_ > 0)) {
      take(next_whole_);
      begin = part_begin_;
      end = part_end_;
      next_whole_ += clusters_;
      return true;
    }
    if (!kCuts || left_ <= 0) return false;
    take(next_cut_++);
    begin = next_begin_;
    end = min(last_, begin + left_);
    left_ -= end - begin;
    next_begin_ = first_;
    return true;
  }

  // All its stages lie between these.
  __device__ int first_stage() const { return part_begin_; }
  __device__ int last_stage() const { return part_end_; }

  // Whether the sums of the present tile are left for another block, and then where.
  __device__ bool leaves() const { return tile_ >= whole_ && begin > 0; }
  __device__ int next_place() { return place_++; }
  // How many others have left sums of it, and where the first has.
  __device__ int others() const { return tile_ >= whole_ && begin == 0 && end < stages_ ? others_ : 0; }
  __device__ int others_place() const { return others_place_; }

 private:
  __device__ void take(int tile) {
    tile_ = tile;
    token_tile = tile / row_tiles_;
    row_tile = tile - token_tile * row_tiles_;
  }

  int tile_, stages_, row_tiles_, whole_, clusters_, next_whole_, part_begin_, part_end_;
  int next_cut_, next_begin_, first_, last_, left_, place_, others_, others_place_;
};

// Partial sums that threads of this block wrote, and a barrier ordered, become visible with `filled`.
__device__ inline void announce(uint64_t* filled) {
  asm volatile("fence.acq_rel.gpu; st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(filled), "l"(kFilled) : "memory");
}
// Waits for them, for the copy engine to read.
__device__ inline void await(uint64_t* filled) {
  uint64_t v;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(filled) : "memory");
  } while (v != kFilled);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(filled), "l"(uint64_t(0)) : "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

// Fetches words of all rows of the tile: each thread kCopy bytes of a row at a time.
template <int kCopy, class Layout, class Tile>
__device__ void fetch_words(const WarpgroupProblem& p, int64_t first_row, int64_t first_word, SharedAddress to,
                            int thread) {
  constexpr int kPerRow = Layout::kWordsOfRow * 4 / kCopy;
  constexpr int kCopies = Tile::kRows * kPerRow;
#pragma unroll
  for (int i = thread; i < kCopies; i += kWarpgroup) {
    const int64_t row = first_row + i / kPerRow;
    const int64_t word = first_word + i % kPerRow * (kCopy / 4);
    const bool wanted = row < p.rows && word < p.words;
    copy_or_zero<kCopy>(to + i * kCopy, p.w + (wanted ? row * p.words + word : 0), wanted);
  }
}

// Where both values of columns k and k + 1 lie, k even: [16 columns][lane of a quad][2t and 2t + 1, 2t + 8 and 2t + 9].
__device__ inline SharedAddress place_of_pair(SharedAddress table, uint32_t k) {
  const uint32_t pair = k / 2;
  return table + (pair / 8 * 8 + pair % 4 * 2 + pair % 8 / 4) * sizeof(Values);
}

template <typename T>
__device__ void tabulate_pair(SharedAddress to, float alpha0, float beta0, float alpha1, float beta1) {
  const Values values = values_of<T>(alpha0, beta0, alpha1, beta1);
  store_words(to, values.low, values.difference);
}

// The table of columns `from` to `to`, multiples of 64, zero past K. A thread takes four at a time and asks for those
// of kBatch times at once; the code is short because all of it is fetched before the first product.
template <typename T, int kThreads>
__device__ void tabulate_scales(const WarpgroupProblem& p, int from, int to, SharedAddress table, int thread) {
  constexpr int kBatch = 5;
  constexpr int kColumns = 4 * kThreads;  // at a time
  const bool vector =
      p.K % 4 == 0 && reinterpret_cast<uintptr_t>(p.alpha) % 16 == 0 && reinterpret_cast<uintptr_t>(p.beta) % 16 == 0;
  if (!vector) {
#pragma unroll 1
    for (int k = from + 2 * thread; k < to; k += 2 * kThreads) {
      const bool first = k < p.K;
      const bool second = k + 1 < p.K;
      tabulate_pair<T>(place_of_pair(table, k), first ? p.alpha[k] : 0.0f, first ? p.beta[k] : 0.0f,
                       second ? p.alpha[k + 1] : 0.0f, second ? p.beta[k + 1] : 0.0f);
    }
    return;
  }
#pragma unroll 1
  for (int first = from + 4 * thread; first < to; first += kColumns * kBatch) {
    float4 alpha[kBatch], beta[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int k = first + kColumns * j;
      alpha[j] = k < p.K ? *reinterpret_cast<const float4*>(p.alpha + k) : float4{};
      beta[j] = k < p.K ? *reinterpret_cast<const float4*>(p.beta + k) : float4{};
    }
    const SharedAddress place = place_of_pair(table, first);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + kColumns * j >= to) break;
      const SharedAddress pair = place + kColumns / 2 * j * sizeof(Values);
      tabulate_pair<T>(pair, alpha[j].x, beta[j].x, alpha[j].y, beta[j].y);
      tabulate_pair<T>(pair + 2 * sizeof(Values), alpha[j].z, beta[j].z, alpha[j].w, beta[j].w);
    }
  }
}

// This block's share of what all blocks will read soon, if it is not much: meanwhile the kernel before ends.
__device__ inline void prefetch_slice(const void* p, int64_t bytes) {
  constexpr int64_t kMost = 16 << 20;
  if (bytes > kMost || reinterpret_cast<uintptr_t>(p) % 16 != 0) return;
  const uint32_t vectors = static_cast<uint32_t>(bytes / 16);
  const uint32_t each = (vectors + gridDim.x - 1) / gridDim.x;
  const uint32_t from = min(vectors, each * blockIdx.x);
  prefetch_to_l2(static_cast<const uint4*>(p) + from, 16 * (min(vectors, from + each) - from));
}

// kAdds: `output` is the residual that sums are added to.
template <class F, ScalesOf kScales, class Tile, bool kCluster, bool kAdds>
__device__ void produce(const CUtensorMap& activations, const CUtensorMap& output, const WarpgroupProblem& p,
                        SharedAddress stages, int slots, SharedAddress full, SharedAddress empty, int rank, int blocks,
                        int cluster, int clusters) {
  using Layout = WarpgroupLayout<F, Tile>;
  const int thread = threadIdx.x % kWarpgroup;
  if (thread == 32) {
    prefetch_slice(p.x, p.x_bytes);
    prefetch_slice(p.w, p.rows * p.words * 4);
  }
  if (kScales == ScalesOf::kColumns && thread == 64) {
    prefetch_slice(p.alpha, p.K / 4 * 16);
    prefetch_slice(p.beta, p.K / 4 * 16);
  }
  constexpr bool kCuts = Tile::kCuts && !kCluster;
  WarpgroupWork<kCuts, kAdds> work(p, static_cast<int>(ceil_div(p.K, Layout::kDepth)), rank, blocks, cluster, clusters);
  bool more = work.next();
  wait_for_previous_kernel();
  let_next_kernel_start();

  int slot = 0;
  int parity = 1;
  SharedAddress stage = stages;
  const auto advance = [&] {
    stage += Layout::kStageBytes;
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
      stage = stages;
    }
  };
  // One of the warps that fetch announces sums that were left, because whoever does so waits until they have arrived: a
  // ring of stages later, and before the next ones can be left.
  int left = -1;
  int until = 0;
  const auto announce_left = [&] {
    if (thread / 32 == 3) {
      named_barrier(Tile::kLeftBarrier, kWarpgroup * Tile::kConsumers + 32);
      if (thread % 32 == 0) announce(p.filled + left);
    }
    left = -1;
  };
  for (; more; more = work.next()) {
    const int64_t row = int64_t(work.row_tile) * Tile::kRows;
    const int token = work.token_tile * Tile::kTokens;
    for (int s = work.begin; s < work.end; ++s) {
      if (kCuts && left >= 0 && (until-- == 0 || s + 1 == work.end)) announce_left();
      barrier_wait(empty + 8 * slot, parity);
      if constexpr (kAdds) {
        // What the copy engine will add to comes to L2 while products run.
        constexpr int kAcross = Tile::kRows / 32;
        const int part = s - work.begin, down = Tile::kAddedHalves + part / kAcross;
        if (thread == 96 && down < 2 * Tile::kAddedHalves && work.begin == 0) {
          prefetch_box(&output, static_cast<int>(row) + 32 * (part % kAcross), token + down * Tile::kAddedTokens);
        }
      }
      if (thread == 0) {
        barrier_arrive_expecting(full + 8 * slot, Tile::kActivationBytes);
#pragma unroll
        for (int box = 0; box < Tile::kBoxes; ++box) {
          load_box(&activations, stage + box * Tile::kBoxSize, full + 8 * slot, s * Layout::kDepth + box * Layout::kBox,
                   token);
        }
      }
      const SharedAddress words = stage + Tile::kActivationBytes;
      constexpr int kCopy = Layout::kWordsOfRow * 4 < 16 ? Layout::kWordsOfRow * 4 : 16;
      if (p.aligned_words) {
        fetch_words<kCopy, Layout, Tile>(p, row, int64_t(s) * Layout::kWordsOfRow, words, thread);
      } else {
        fetch_words<4, Layout, Tile>(p, row, int64_t(s) * Layout::kWordsOfRow, words, thread);
      }
      barrier_arrive_after_copies(full + 8 * slot);
      advance();
    }
    if constexpr (kCuts) {
      if (work.leaves()) {
        left = work.next_place();
        until = slots;
      }
#pragma unroll 1
      for (int other = 0; other < work.others(); ++other) {
        const int place = work.others_place() + other;
        if (thread == 0) await(p.filled + place);
        const char* partial = reinterpret_cast<const char*>(p.partials) + int64_t(place) * Tile::kPartialBytes;
#pragma unroll 1
        for (int i = 0; i < Tile::kBlocksOfEight; i += Tile::kBlocksOfStage) {
          barrier_wait(empty + 8 * slot, parity);
          if (thread == 0) {
            const int bytes = min(Tile::kBlocksOfStage, Tile::kBlocksOfEight - i) * Tile::kPartialBlock;
            barrier_arrive_expecting(full + 8 * slot, bytes);
            load_bytes(stage, partial + i * Tile::kPartialBlock, bytes, full + 8 * slot);
          }
          barrier_arrive_after_copies(full + 8 * slot);
          advance();
        }
      }
    }
  }
  if (kCuts && left >= 0) announce_left();
}

}  // namespace bitkernels::cuda
