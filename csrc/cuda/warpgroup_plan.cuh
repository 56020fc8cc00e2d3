// Which tile the warpgroup kernel takes, and how many blocks share one.
#pragma once

#include "warpgroup.cuh"

namespace bitkernels::cuda {

// The float formats have 216 tokens in place of the integer ones' 208, which wgmma wants to be a multiple of 16.
template <typename T>
constexpr int kTokensOfTile[] = {16, 32, 64, 128, 176, std::is_same_v<T, int8_t> ? 208 : 216, 256};
constexpr int kTiles = 7;

template <typename T, int tile>
using TileOf = std::conditional_t<
    tile == 0, WarpgroupTile<16, 1, 2, 4, 6, 2>,
    std::conditional_t<tile == 1, WarpgroupTile<32, 1, 2, 4, 4, 2>,
                       std::conditional_t<tile == 2, WarpgroupTile<64, 1, 2, 4, 3, 1>,
                                          std::conditional_t<tile == 3, WarpgroupTile<128, 2, 1, 2, 4, 1>,
                                                             WarpgroupTile<kTokensOfTile<T>[tile], 2, 1, 1,
                                                                           tile == 6 ? 4 : 5, 1>>>>>;  // clang-format
                                                                                                       // would stack
                                                                                                       // these

struct Plan {
  int tile;
  int blocks;  // of a cluster, which split K
};

// Processor cycles of one step of K (64 bytes of a token) and of what surrounds a tile, measured on an H200. A narrow
// tile costs what its decoding costs, a wide one what its products cost.
struct TileCost {
  int rows, step, rest;
};
constexpr TileCost kTileCosts[kTiles] = {{64, 95, 1100},   {64, 105, 1100},  {64, 112, 1300}, {128, 292, 1700},
                                         {128, 385, 2200}, {128, 462, 2500}, {128, 524, 2900}};
constexpr int kStartCost = 3500;    // of a block, until its first products
constexpr int kClusterCost = 1500;  // of starting together and adding up

template <class F, int tile = 0>
bool tile_fits(int wanted, ScalesOf scales, int64_t K, int blocks) {
  if constexpr (tile < kTiles) {
    if (wanted != tile) return tile_fits<F, tile + 1>(wanted, scales, K, blocks);
    return warpgroup_layout<F, TileOf<typename F::T, tile>>(scales, K, blocks).stages >= kLeastStages;
  }
  return false;
}

// The plan of least cost: rounds of tiles over the processors, times what a tile costs.
template <class F>
Plan plan_tiles(ScalesOf scales, int64_t M, int64_t N, int64_t K, int processors) {
  using T = typename F::T;
  const int64_t steps = ceil_div(K * sizeof(T), kStepBytes);
  Plan best{};
  int64_t least = INT64_MAX;
  for (int tile = 0; tile < kTiles; ++tile) {
    const TileCost& cost = kTileCosts[tile];
    const int tokens = kTokensOfTile<T>[tile];
    const int64_t tiles = ceil_div(N, cost.rows) * ceil_div(M, tokens);
    for (int blocks = 1; blocks <= (tokens <= 128 ? kMostCluster : 1); blocks *= 2) {
      // Clusters pay where processors would idle; a second round of them costs a second start.
      if (blocks > 1 && tiles * blocks > processors) break;
      if (!tile_fits<F>(tile, scales, K, blocks)) continue;
      const int64_t rounds = ceil_div(tiles * blocks, processors);
      const int64_t cycles =
          kStartCost + rounds * (ceil_div(steps, blocks) * cost.step + cost.rest) + (blocks > 1 ? kClusterCost : 0);
      if (cycles < least) {
        least = cycles;
        best = {tile, blocks};
      }
    }
  }
  return best;
}

// Calls f with the chosen tile's type.
template <typename T, int tile = 0, typename Function>
void with_tile(int chosen, Function&& f) {
  if constexpr (tile < kTiles) {
    if (chosen == tile) return f(TileOf<T, tile>());
    with_tile<T, tile + 1>(chosen, f);
  }
}

}  // namespace bitkernels::cuda
