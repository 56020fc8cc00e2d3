// Which tile the warpgroup kernel takes, and how many blocks share one.
#pragma once

#include <tuple>

#include "warpgroup.cuh"

namespace bitkernels::cuda {

// The float formats have 216 tokens in place of the integer ones' 208, which wgmma wants to be a multiple of 16.
template <typename T>
using Tiles =
    std::tuple<WarpgroupTile<16, 1, 2, 4, 6, 2>, WarpgroupTile<32, 1, 2, 4, 4, 2>, WarpgroupTile<64, 1, 2, 4, 3, 1>,
               WarpgroupTile<128, 2, 1, 2, 4, 1>, WarpgroupTile<176, 2, 1, 1, 5, 1>,
               WarpgroupTile<std::is_same_v<T, int8_t> ? 208 : 216, 2, 1, 1, 5, 1>, WarpgroupTile<256, 2, 1, 1, 4, 1>>;
constexpr int kTiles = 7;

// Calls f with the chosen tile.
template <typename T, int tile = 0, typename Function>
auto with_tile(int chosen, Function&& f) {
  if constexpr (tile + 1 < kTiles) {
    if (chosen != tile) return with_tile<T, tile + 1>(chosen, f);
  }
  return f(std::tuple_element_t<tile, Tiles<T>>());
}

struct Plan {
  int tile;
  int blocks;  // of a cluster, which split K
  Cut cut;
  int64_t cycles;  // expected, without the launch
};

// Processor cycles of one step of K (64 bytes of a token) and of what surrounds a tile, measured on an H200. A narrow
// tile costs what its decoding costs, a wide one what its products cost.
struct TileCost {
  int step, rest;
};
constexpr TileCost kTileCosts[kTiles] = {{95, 1100},  {105, 1100}, {132, 1300}, {310, 2500},
                                         {425, 2600}, {462, 2800}, {524, 3200}};
constexpr TileCost kInt8TileCosts[kTiles] = {{150, 1100}, {160, 1100}, {170, 1300}, {310, 2500},
                                             {425, 2600}, {462, 2800}, {524, 3200}};
constexpr int kStartCost = 2500;    // of a block, until its first products
constexpr int kClusterCost = 2000;  // of starting together and adding up
// Of partial sums, besides their bytes: to leave them, to fetch them, to add them.
constexpr int kLeaveCost = 500;
constexpr int kFetchCost = 1500;
constexpr int kAddCost = 1800;
constexpr int kPartialBytesPerCycle = 40;
constexpr int kAddedBytesPerCycle = 100;

// Up to so many tokens, as decode steps have, the order of a token's sums does not depend on where in the batch it is:
// tiles are cut only where all tokens share them.
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

// The plan of least cost: rounds of tiles over the processors, times what a tile costs.
template <class F>
Plan plan_tiles(ScalesOf scales, int64_t M, int64_t N, int64_t K, int processors) {
  using T = typename F::T;
  const int64_t steps = ceil_div(K * sizeof(T), kStepBytes);
  Plan best{0, 1, {}, INT64_MAX};
  for (int i = 0; i < kTiles; ++i) {
    with_tile<T>(i, [&](auto tile) {
      using Tile = decltype(tile);
      using Layout = WarpgroupLayout<F, Tile>;
      const auto [step, rest] = (std::is_same_v<T, int8_t> ? kInt8TileCosts : kTileCosts)[i];
      const int64_t tiles = ceil_div(N, Tile::kRows) * ceil_div(M, Tile::kTokens);
      for (int blocks = 1; blocks <= (Tile::kSplits ? kMostCluster : 1); blocks *= 2) {
        // Clusters pay where processors would idle; a second round of them costs a second start.
        if (blocks > 1 && tiles * blocks > processors) break;
        if (warpgroup_layout<F, Tile>(scales, K, blocks).stages < kLeastStages) continue;
        const int64_t whole = ceil_div(steps, blocks) * step + rest;
        const int64_t cycles = kStartCost + ceil_div(tiles, processors) * whole + (blocks > 1 ? kClusterCost : 0);
        if (cycles < best.cycles) best = {i, blocks, {}, cycles};
        if constexpr (Tile::kCuts) {
          if (blocks > 1 || (M > Tile::kTokens && M <= kInvariantTokens)) continue;
          const int64_t stage = Layout::kDepth * sizeof(T) / kStepBytes * step;
          const auto [cut, priced] = price_cut<Tile>(tiles, ceil_div(K, Layout::kDepth), processors, stage, rest);
          if (cut.tiles > 0 && kStartCost + priced < best.cycles) best = {i, 1, cut, kStartCost + priced};
        }
      }
    });
  }
  return best;
}

}  // namespace bitkernels::cuda
