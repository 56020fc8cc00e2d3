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
  int blocks;      // of a cluster, which split K
  int64_t cycles;  // expected, without the launch
};

// Processor cycles of one step of K (64 bytes of a token) and of what surrounds a tile, measured on an H200. A narrow
// tile costs what its decoding costs, a wide one what its products cost.
struct TileCost {
  int step, rest;
};
constexpr TileCost kTileCosts[kTiles] = {{95, 1100},  {105, 1100}, {112, 1300}, {292, 1700},
                                         {385, 2200}, {462, 2500}, {524, 2900}};
constexpr int kStartCost = 3500;    // of a block, until its first products
constexpr int kClusterCost = 1500;  // of starting together and adding up

// The plan of least cost: rounds of tiles over the processors, times what a tile costs.
template <class F>
Plan plan_tiles(ScalesOf scales, int64_t M, int64_t N, int64_t K, int processors) {
  using T = typename F::T;
  const int64_t steps = ceil_div(K * sizeof(T), kStepBytes);
  Plan best{0, 1, INT64_MAX};
  for (int i = 0; i < kTiles; ++i) {
    with_tile<T>(i, [&](auto tile) {
      using Tile = decltype(tile);
      const int64_t tiles = ceil_div(N, Tile::kRows) * ceil_div(M, Tile::kTokens);
      for (int blocks = 1; blocks <= (Tile::kSplits ? kMostCluster : 1); blocks *= 2) {
        // Clusters pay where processors would idle; a second round of them costs a second start.
        if (blocks > 1 && tiles * blocks > processors) break;
        if (warpgroup_layout<F, Tile>(scales, K, blocks).stages < kLeastStages) continue;
        const int64_t rounds = ceil_div(tiles * blocks, processors);
        const int64_t cycles = kStartCost +
                               rounds * (ceil_div(steps, blocks) * kTileCosts[i].step + kTileCosts[i].rest) +
                               (blocks > 1 ? kClusterCost : 0);
        if (cycles < best.cycles) best = {i, blocks, cycles};
      }
    });
  }
  return best;
}

}  // namespace bitkernels::cuda
