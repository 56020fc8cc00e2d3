// Which tile the warpgroup kernel takes, and how many blocks share one.
#pragma once

#include <array>
#include <tuple>
#include <utility>

#include "warpgroup.cuh"

namespace bitkernels::cuda {

// wgmma wants the integer formats' tokens to be a multiple of 16. Their tiles of 192 rows would have sums, words and
// tokens in more registers than there are.
using Int8Tiles =
    std::tuple<WarpgroupTile<16, 1, 2, 4, 6, 2>, WarpgroupTile<32, 1, 2, 4, 4, 2>, WarpgroupTile<64, 1, 2, 4, 3, 1>,
               WarpgroupTile<64, 2, 1, 2, 6, 1>, WarpgroupTile<96, 2, 1, 2, 5, 1>, WarpgroupTile<128, 2, 1, 2, 4, 1>,
               WarpgroupTile<176, 2, 1, 1, 5, 1>, WarpgroupTile<208, 2, 1, 1, 5, 1>, WarpgroupTile<256, 2, 1, 1, 4, 1>>;
using FloatTiles =
    std::tuple<WarpgroupTile<16, 1, 2, 4, 6, 2>, WarpgroupTile<32, 1, 2, 4, 4, 2>, WarpgroupTile<64, 1, 2, 4, 3, 1>,
               WarpgroupTile<64, 2, 1, 2, 6, 1>, WarpgroupTile<96, 2, 1, 2, 5, 1>, WarpgroupTile<128, 2, 1, 2, 4, 1>,
               WarpgroupTile<176, 2, 1, 2, 4, 1>, WarpgroupTile<216, 2, 1, 1, 5, 1>, WarpgroupTile<256, 2, 1, 1, 4, 1>,
               WarpgroupTile<128, 3, 1, 2, 4, 1>>;
// Products of pairs are bound by shared memory: activations come there once for a tile, and are read once for 64 rows.
// So rows are many.
using PairTiles =
    std::tuple<WarpgroupTile<64, 2, 1, 2, 6, 1>, WarpgroupTile<96, 2, 1, 2, 5, 1>, WarpgroupTile<128, 2, 1, 2, 5, 1>,
               WarpgroupTile<64, 4, 1, 2, 6, 1>, WarpgroupTile<96, 4, 1, 2, 5, 1>, WarpgroupTile<128, 3, 1, 2, 5, 1>,
               WarpgroupTile<128, 4, 1, 2, 4, 1>, WarpgroupTile<192, 2, 1, 2, 4, 1>>;
template <class F>
struct TilesOf {
  using type = FloatTiles;
};
template <>
struct TilesOf<TernaryInt8Operand> {
  using type = Int8Tiles;
};
template <>
struct TilesOf<PairOperand> {
  using type = PairTiles;
};
template <class F>
using Tiles = typename TilesOf<F>::type;
template <class F>
constexpr int kTiles = std::tuple_size_v<Tiles<F>>;
// What products that are added to a residual take.
constexpr int kAddedTile = 6;
using AddedTile = std::tuple_element_t<kAddedTile, PairTiles>;

// Calls f with the chosen tile.
template <class F, int tile = 0, typename Function>
auto with_tile(int chosen, Function&& f) {
  if constexpr (tile + 1 < kTiles<F>) {
    if (chosen != tile) return with_tile<F, tile + 1>(chosen, f);
  }
  return f(std::tuple_element_t<tile, Tiles<F>>());
}

struct Plan {
  int tile;
  int blocks;  // of a cluster, which split K
  Cut cut;
  int64_t cycles;  // expected, without the launch
};

// Cycles at 1.8 GHz of one step of K (64 bytes of a token) and of what surrounds a tile, fitted to times of calls on an
// H200; for int8 to those of an older version, but for tiles of 128 x 64 and 128 x 96, which are guesses; of pairs,
// counted by the processor's clock, and a fifteenth more, as the others' fits are. A narrow tile costs what its
// decoding costs, a wide one what its products cost.
struct TileCost {
  int step, rest;
};
template <class F>
constexpr TileCost tile_cost(int tile) {
  constexpr TileCost kFloat[] = {{95, 3100},  {105, 3100}, {136, 2800}, {214, 1400}, {259, 800},
                                 {291, 2300}, {396, 2900}, {495, 2500}, {537, 5700}, {430, 3000}};
  constexpr TileCost kInt8[] = {{150, 3100}, {160, 3100}, {170, 2800}, {300, 1400}, {305, 1000},
                                {310, 1000}, {425, 1000}, {462, 1000}, {524, 2600}};
  constexpr TileCost kPairs[] = {{160, 1700}, {176, 2000}, {196, 2500}, {262, 2500},
                                 {307, 3200}, {292, 3100}, {370, 4000}, {290, 3300}};
  if constexpr (std::is_same_v<F, PairOperand>)
    return kPairs[tile];
  else
    return std::is_same_v<F, TernaryInt8Operand> ? kInt8[tile] : kFloat[tile];
}
// With so few boxes of a token in all stages, a step of the float formats costs a tenth more: the copy engine does not
// keep ahead.
constexpr int kFewBoxes = 3;
constexpr int kStartCost = 1400;  // of a block, until its first products
// Of a cluster, for each of its blocks, and of its sums.
constexpr int kClusterCost = 300;
constexpr int kSentBytesPerCycle = 16;
// Of partial sums, besides their bytes: to leave them, to fetch them, to add them.
constexpr int kLeaveCost = 500;
constexpr int kFetchCost = 2500;
constexpr int kAddCost = 1300;
constexpr int kPartialBytesPerCycle = 25;
constexpr int kAddedBytesPerCycle = 60;

// Clusters that run at once. The processors of one belong to the same group of up to 18, and not all groups are full.
inline int64_t most_clusters(int64_t processors, int blocks) { return processors / 18 * (16 / blocks); }

// Up to so many tokens, as decode steps have, the order of a token's sums does not depend on where in the batch it is:
// tiles are cut only where one holds all tokens, or all are cut alike.
constexpr int64_t kInvariantTokens = 256;

struct PricedCut {
  Cut cut;
  int64_t cycles;  // of all rounds
};

// Of tiles that fill no round, each has an owner, which makes as much of it as keeps it busy until the sums of the
// others are there: helpers have several tiles to help with, or tiles have several helpers, though not many, as their
// sums come to one block. Of more tiles those of the last round and the one before are cut: so a share is longer than a
// tile, and a tile has two parts.
template <class Tile>
PricedCut price_cut(int64_t tiles, int64_t stages, int64_t processors, int64_t stage, int64_t rest) {
  constexpr int64_t kMostHelpers = 3;
  constexpr int64_t kMoved = Tile::kPartialBytes / kPartialBytesPerCycle;
  constexpr int64_t kAdded = kAddCost + Tile::kPartialBytes / kAddedBytesPerCycle;
  const int64_t rounds = tiles / processors;
  const bool countable = 2 * processors * stages * processors <= INT32_MAX;  // by WarpgroupWork
  if (tiles % processors == 0 || !countable) return {{}, INT64_MAX};
  if (rounds > 0) {
    const int64_t cut = tiles % processors + processors;
    return {{.tiles = static_cast<int>(cut)},
            (rounds - 1) * (stages * stage + rest) + ceil_div(cut * stages, processors) * stage + 2 * rest +
                kLeaveCost + kMoved + kAdded};
  }
  const int64_t idle = processors - tiles;
  if (idle == 0) return {{}, INT64_MAX};
  const int64_t helpers = idle >= tiles ? std::min(kMostHelpers, idle / tiles) : 1;
  const int64_t helped = idle >= tiles ? 1 : ceil_div(tiles, idle);
  const int64_t later = helped * (kLeaveCost + kMoved) + kFetchCost;
  const int64_t own = ceil_div(stages * helped * stage + helpers * later, (helpers + helped) * stage);
  if (own + helpers > stages) return {{}, INT64_MAX};
  return {{static_cast<int>(tiles), static_cast<int>(own), static_cast<int>(helpers), static_cast<int>(helped)},
          own * stage + rest + kAdded + (helpers - 1) * kMoved};
}

// The plan of least cost: rounds of tiles over the processors, times what a tile costs. Of the tiles [first, end).
template <class F>
Plan find_plan(ScalesOf scales, int64_t M, int64_t N, int64_t K, int processors, int first, int end) {
  using T = typename F::T;
  const int64_t steps = ceil_div(K * sizeof(T), kStepBytes);
  Plan best{first, 1, {}, INT64_MAX};
  for (int i = first; i < end; ++i) {
    with_tile<F>(i, [&](auto tile) {
      using Tile = decltype(tile);
      using Layout = WarpgroupLayout<F, Tile>;
      constexpr bool kInteger = std::is_same_v<T, int8_t>;
      const auto [fed_step, rest] = tile_cost<F>(i);
      const int64_t tiles = ceil_div(N, Tile::kRows) * ceil_div(M, Tile::kTokens);
      for (int blocks = 1; blocks <= (Tile::kSplits ? kMostCluster : 1); ++blocks) {
        // Clusters pay where processors would idle; a second round of them costs a second start.
        if (blocks > 1 && tiles > most_clusters(processors, blocks)) break;
        const int stages = warpgroup_layout<F, Tile>(scales, K, blocks).stages;
        if (stages < kLeastStages) continue;
        const bool fed = kInteger || stages * Tile::kBoxes > kFewBoxes;
        const int step = fed ? fed_step : fed_step + fed_step / 10;
        const int64_t whole = ceil_div(steps, blocks) * step + rest;
        const int64_t exchange = blocks > 1 ? kClusterCost * blocks + Tile::kPartialBytes / kSentBytesPerCycle : 0;
        const int64_t cycles = kStartCost + ceil_div(tiles, processors) * whole + exchange;
        if (cycles < best.cycles) best = {i, blocks, {}, cycles};
        if constexpr (Tile::kCuts) {
          if (blocks > 1) continue;
          const int64_t stage = Layout::kDepth * sizeof(T) / kStepBytes * step;
          const auto [cut, priced] = price_cut<Tile>(tiles, ceil_div(K, Layout::kDepth), processors, stage, rest);
          const bool alike = M <= Tile::kTokens || M > kInvariantTokens || cut.own > 0;
          if (cut.tiles > 0 && alike && kStartCost + priced < best.cycles) best = {i, 1, cut, kStartCost + priced};
        }
      }
    });
  }
  return best;
}

// Remembered: to find one takes longer than to launch a kernel.
template <class F>
Plan plan_tiles(ScalesOf scales, int64_t M, int64_t N, int64_t K, int processors, int first = 0, int end = kTiles<F>) {
  using Call = std::tuple<ScalesOf, int64_t, int64_t, int64_t, int, int, int>;
  constexpr int kRemembered = 64;
  static thread_local std::array<std::pair<Call, Plan>, kRemembered> plans{};
  const Call call{scales, M, N, K, processors, first, end};
  auto& [known, plan] = plans[static_cast<uint64_t>(M * 31 + N * 7 + K) % kRemembered];
  if (known != call) plan = find_plan<F>(scales, M, N, K, processors, first, end), known = call;
  return plan;
}

}  // namespace bitkernels::cuda
