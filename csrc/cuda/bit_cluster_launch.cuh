// A few tokens in one launch: how many blocks share tiles and split K.
#pragma once

#include <algorithm>

#include "bit_cluster.cuh"
#include "bit_launch.cuh"

namespace bitkernels::cuda {

struct BitClusterPlan {
  int64_t tile_rows, tiles, tiles_of_cluster, clusters;
  int64_t steps;  // of 256 columns of bits, in a part
  int64_t part;   // elements of a row
  int parts_log2, stages;
  int sharers, turns;  // warps that share a step, and the tokens of each
  size_t shared_bytes;
  int64_t cycles = 0;  // expected, the start included
  bool fits = false;
};

inline BitClusterArgs cluster_args(const TokenSource& s, const Epilogue& e, const BitClusterPlan& p) {
  BitClusterArgs a = {};
  a.x = s.x;
  a.scale = s.scale;
  a.shift = s.shift;
  a.K = static_cast<int>(s.K);
  a.tokens = static_cast<int>(s.M);
  a.part = static_cast<int>(p.part);
  a.steps = static_cast<int>(p.steps);
  a.steps_inverse = (1 << 16) / a.steps + 1;
  a.sharers = p.sharers;
  a.tile_rows = static_cast<int>(p.tile_rows);
  a.tiles = static_cast<int>(p.tiles);
  a.tiles_of_cluster = static_cast<int16_t>(p.tiles_of_cluster);
  a.stages = static_cast<int8_t>(p.stages);
  a.parts_log2 = static_cast<int8_t>(p.parts_log2);
  a.e = e;
  return a;
}

// Processor cycles on an H200, fitted to the times of calls with five to eight tokens: what every call takes, what each
// token of a warp does, splitting K once more, and a column of a tile's sums.
constexpr int64_t kClusterStartCycles = 5400;
constexpr int64_t kTurnCycles = 750;
constexpr int64_t kPartsCycles = 180;
constexpr int64_t kColumnCycles = 7;
constexpr int64_t kResidualBytesPerCycle = 18;  // which all blocks read at once

// Tokens of a warp beyond which preparing in every block takes longer than a launch that prepares once.
template <int kTokens>
constexpr int kMostTurns = kTokens > 4 ? 3 : kTokens;

// Calls f with the tokens that a warp prepares at most, a constant.
template <int kTokens, typename Function>
void with_turns(int turns, Function&& f) {
  if constexpr (kTokens > 1) {
    if (turns == 1) return f(std::integral_constant<int, 1>());
  }
  if constexpr (kTokens > 2) {
    if (turns == 2) return f(std::integral_constant<int, 2>());
  }
  f(std::integral_constant<int, kMostTurns<kTokens>>());
}

// Parts are whole vectors, no more steps than there are warps, and all of the same size: the copy engine sees a row as
// so many of them.
template <typename F, typename T, int kColumns, BlockStep kStep>
BitClusterPlan cluster_plan(const TokenSource& s, const Weights& w, int parts_log2) {
  using Layout = BitClusterLayout<F, T, kColumns, kStep>;
  constexpr int kTokens = Layout::kTokens;
  constexpr int kVectorBytes = 16;
  BitClusterPlan p;
  const int64_t row_bytes = 4 * w.words;
  const int64_t part_bytes = row_bytes >> parts_log2;
  p.parts_log2 = parts_log2;
  p.part = part_bytes / 4 * F::kPerWord;
  p.steps = ceil_div(part_bytes, kStepBytesOfRow);
  if (p.steps < 1 || p.steps > kClusterWarps) return p;
  if (part_bytes % kVectorBytes != 0 || part_bytes << parts_log2 != row_bytes) return p;
  p.sharers = static_cast<int>(std::min<int64_t>(kClusterWarps / p.steps, s.M));
  p.turns = static_cast<int>(ceil_div(s.M, p.sharers));
  if (p.turns > kMostTurns<kTokens>) return p;
  // Tiles of as many rows as make all clusters equal.
  const int64_t at_once =
      clusters_at_once(bit_cluster_kernel<F, T, kColumns, kMostTurns<kTokens>, kStep>, parts_log2, kClusterThreads);
  const int64_t rows = ceil_div(w.rows, at_once);
  p.tiles_of_cluster = ceil_div(rows, kBitMmaRows);
  p.tile_rows = ceil_div(rows, p.tiles_of_cluster);
  p.tiles = ceil_div(w.rows, p.tile_rows);
  p.clusters = ceil_div(p.tiles, p.tiles_of_cluster);
  if (p.tiles_of_cluster > INT16_MAX) return p;

  // Of each warpgroup as many stages as it has boxes, or as fit.
  p.stages = 0;
  p.cycles = kClusterStartCycles + p.turns * kTurnCycles + parts_log2 * kPartsCycles +
             p.tiles_of_cluster * p.steps * bit_step_cycles(kColumns) +
             ceil_div(p.tiles_of_cluster, kClusterGroups) * kColumns * kColumnCycles +
             p.tiles_of_cluster * p.tile_rows * part_bytes / kBytesPerCycle;
  if (kStep == BlockStep::kIn) p.cycles += s.M * p.part * int64_t(sizeof(float)) / kResidualBytesPerCycle;
  BitClusterArgs a = cluster_args(s, Epilogue{}, p);
  constexpr int64_t kStatic = 2048;  // room for the kernel's own shared variables
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStatic - kPanelAlignment;
  const int64_t boxes = ceil_div(p.tiles_of_cluster, kClusterGroups) * ceil_div(p.steps, kPanelSteps);
  const int64_t room = (most - Layout(a).bytes) / (kClusterGroups * kClusterStageBytes);
  const int64_t stages = std::min<int64_t>({boxes, room, kMostClusterStages / kClusterGroups});
  p.fits = stages >= std::min<int64_t>(boxes, 2);
  a.stages = static_cast<int8_t>(p.stages = static_cast<int>(stages * kClusterGroups));
  p.shared_bytes = size_t(kPanelAlignment + Layout(a).bytes);
  return p;
}

template <typename F, typename T, int kColumns, BlockStep kStep = BlockStep::kNone>
void run_cluster(const TokenSource& s, const Weights& w, const Epilogue& e, const BitClusterPlan& p,
                 const StepOperands& step, cudaStream_t stream) {
  BitClusterArgs a = cluster_args(s, e, p);
  a.step = step;
  const cuuint64_t parts = cuuint64_t(1) << p.parts_log2;
  const cuuint64_t row_bytes = 4 * w.words;
  a.weights =
      box_map<uint8_t, 3>(w.packed, {row_bytes / parts, parts, static_cast<cuuint64_t>(w.rows)},
                          {row_bytes / parts, row_bytes}, {kPanelRowBytes, 1, static_cast<cuuint32_t>(p.tile_rows)});
  constexpr bool kInChain = kStep != BlockStep::kNone;
  Grid grid{dim3(static_cast<unsigned>(p.clusters << p.parts_log2)), kClusterThreads, p.shared_bytes, kInChain};
  grid.cluster = 1 << p.parts_log2;
  grid.beside_previous = kInChain;
  with_turns<BitClusterLayout<F, T, kColumns, kStep>::kTokens>(
      p.turns, [&](auto turns) { launch(bit_cluster_kernel<F, T, kColumns, turns, kStep>, grid, stream, a); });
}

// Planes of as many tokens.
template <typename F, typename T>
constexpr int kMostClusterColumns = F::kPerWord < kSignsPerWord      ? 32
                                    : FusedFormat<F, T>::kLimbs == 1 ? 128
                                                                     : 64;

// Calls f with the number of columns, a constant.
template <typename F, typename T, typename Function>
auto with_cluster_columns(int64_t tokens, Function&& f) {
  constexpr int kPlanes = FusedFormat<F, T>::kPlanes;
  if constexpr (kPlanes <= 16) {
    if (tokens == 1) return f(std::integral_constant<int, 16>());
  }
  if constexpr (kMostClusterColumns<F, T> > 64) {
    if (tokens * kPlanes > 64) return f(std::integral_constant<int, 128>());
  }
  return f(std::integral_constant<int, 64>());
}

// Two blocks of a cluster, or more where rows are few: processors would idle, and with more than one token preparing
// takes longer than adding up more parts. Or four where an input projection takes less, as it reads fp32. As measured
// on an H200. The nearest number that fits, fewer first.
template <typename F, typename T, BlockStep kStep = BlockStep::kNone>
BitClusterPlan choose_cluster(const TokenSource& s, const Weights& w) {
  constexpr int64_t kFewRows = 64 * kBitMmaRows;
  return with_cluster_columns<F, T>(s.M, [&](auto columns) {
    const auto plan = [&](int parts_log2) { return cluster_plan<F, T, columns, kStep>(s, w, parts_log2); };
    const int wanted = w.rows > kFewRows ? 1 : s.M == 1 ? 2 : 3;
    if (kStep == BlockStep::kIn && wanted == 1) {
      const BitClusterPlan four = plan(2);
      if (four.fits && four.cycles < plan(1).cycles) return four;
    }
    for (int parts_log2 = wanted; parts_log2 >= 0; --parts_log2) {
      const BitClusterPlan p = plan(parts_log2);
      if (p.fits) return p;
    }
    BitClusterPlan p;
    for (int parts_log2 = wanted + 1; parts_log2 <= kMostPartsLog2 && !p.fits; ++parts_log2) p = plan(parts_log2);
    return p;
  });
}

// Of tokens, scales and rows of weights in whole vectors. The instructions exist in compute capability 9.0 alone, and
// in code built for 9.0a.
template <typename F>
BitClusterPlan plan_cluster(const TokenSource& s, const Weights& w) {
  BitClusterPlan plan;
#ifdef BITKERNELS_SM90A
  if (!w.vector || device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) return plan;
  dispatch_float(s.dtype, [&](auto t) {
    using T = decltype(t);
    using Format = FusedFormat<F, T>;
    constexpr int kRun = Format::kPerLane;
    constexpr size_t kRunBytes = kRun * sizeof(T) < 16 ? kRun * sizeof(T) : 16;
    if (s.M * Format::kPlanes > kMostClusterColumns<F, T>) return;
    if (s.K % kRun != 0 || !aligned(s.x, kRunBytes) || !aligned(s.scale, 16) || !aligned(s.shift, 16)) return;
    plan = choose_cluster<F, T>(s, w);
    // Beyond four tokens, preparing in every block may take longer than a launch that prepares once.
    if (s.M > 4 && bits_apply(s.M, s.K)) plan.fits &= plan.cycles < plan_bits<F>(s.dtype, s.M, w.rows, s.K).cycles;
  });
#endif
  return plan;
}

template <typename F>
void run_cluster(const TokenSource& s, const Weights& w, const Epilogue& e, cudaStream_t stream) {
  dispatch_float(s.dtype, [&](auto t) {
    using T = decltype(t);
    with_cluster_columns<F, T>(
        s.M, [&](auto columns) { run_cluster<F, T, columns>(s, w, e, choose_cluster<F, T>(s, w), {}, stream); });
  });
}

}  // namespace bitkernels::cuda
