// A few tokens in one launch: how many blocks share tiles and split K.
#pragma once

#include <algorithm>

#include "bit_cluster.cuh"
#include "fused_launch.cuh"

namespace bitkernels::cuda {

struct BitClusterPlan {
  int64_t tile_rows, tiles, tiles_of_cluster, clusters;
  int64_t steps;  // of 256 columns of bits, in a part
  int parts_log2, stages;
  size_t shared_bytes;
  bool fits = false;
};

inline BitClusterArgs cluster_args(const TokenSource& s, const Epilogue& e, const BitClusterPlan& p) {
  BitClusterArgs a = {};
  a.x = s.x;
  a.scale = s.scale;
  a.shift = s.shift;
  a.K = static_cast<int>(s.K);
  a.tokens = static_cast<int>(s.M);
  a.steps = static_cast<int>(p.steps);
  a.steps_inverse = (1 << 16) / a.steps + 1;
  a.sharers = static_cast<int>(std::min<int64_t>(kClusterWarps / p.steps, s.M));
  a.tile_rows = static_cast<int>(p.tile_rows);
  a.tiles = static_cast<int>(p.tiles);
  a.tiles_of_cluster = static_cast<int16_t>(p.tiles_of_cluster);
  a.stages = static_cast<int8_t>(p.stages);
  a.parts_log2 = static_cast<int8_t>(p.parts_log2);
  a.e = e;
  return a;
}

// Parts are whole steps, no more than there are warps, and all of the same size: the copy engine sees a row as so many
// of them.
template <typename F, typename T, int kColumns>
BitClusterPlan cluster_plan(const TokenSource& s, const Weights& w, int parts_log2) {
  BitClusterPlan p;
  const int64_t row_bytes = 4 * w.words;
  const int64_t steps = ceil_div(row_bytes, kStepBytesOfRow);
  p.parts_log2 = parts_log2;
  p.steps = steps >> parts_log2;
  if (p.steps < 1 || p.steps > kClusterWarps) return p;
  if (parts_log2 > 0 && row_bytes % (int64_t(kStepBytesOfRow) << parts_log2) != 0) return p;
  // Tiles of as many rows as make all clusters equal.
  const int64_t at_once = clusters_at_once(bit_cluster_kernel<F, T, kColumns>, parts_log2, kClusterThreads);
  const int64_t rows = ceil_div(w.rows, at_once);
  p.tiles_of_cluster = ceil_div(rows, kBitMmaRows);
  p.tile_rows = ceil_div(rows, p.tiles_of_cluster);
  p.tiles = ceil_div(w.rows, p.tile_rows);
  p.clusters = ceil_div(p.tiles, p.tiles_of_cluster);
  if (p.tiles_of_cluster > INT16_MAX) return p;

  // Of each warpgroup as many stages as it has boxes, or as fit.
  p.stages = 0;
  BitClusterArgs a = cluster_args(s, Epilogue{}, p);
  constexpr int64_t kStatic = 2048;  // room for the kernel's own shared variables
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStatic - kPanelAlignment;
  const int64_t boxes = ceil_div(p.tiles_of_cluster, kClusterGroups) * ceil_div(p.steps, kPanelSteps);
  const int64_t room = (most - BitClusterLayout<F, T, kColumns>(a).bytes) / (kClusterGroups * kClusterStageBytes);
  const int64_t stages = std::min<int64_t>({boxes, room, kMostClusterStages / kClusterGroups});
  p.fits = stages >= std::min<int64_t>(boxes, 2);
  a.stages = static_cast<int8_t>(p.stages = static_cast<int>(stages * kClusterGroups));
  p.shared_bytes = size_t(kPanelAlignment + BitClusterLayout<F, T, kColumns>(a).bytes);
  return p;
}

template <typename F, typename T, int kColumns>
void run_cluster(const TokenSource& s, const Weights& w, const Epilogue& e, const BitClusterPlan& p,
                 cudaStream_t stream) {
  BitClusterArgs a = cluster_args(s, e, p);
  const cuuint64_t parts = cuuint64_t(1) << p.parts_log2;
  const cuuint64_t row_bytes = 4 * w.words;
  a.weights =
      box_map<uint8_t, 3>(w.packed, {row_bytes / parts, parts, static_cast<cuuint64_t>(w.rows)},
                          {row_bytes / parts, row_bytes}, {kPanelRowBytes, 1, static_cast<cuuint32_t>(p.tile_rows)});
  Grid grid{dim3(static_cast<unsigned>(p.clusters << p.parts_log2)), kClusterThreads, p.shared_bytes};
  grid.cluster = 1 << p.parts_log2;
  launch(bit_cluster_kernel<F, T, kColumns>, grid, stream, a);
}

// Planes of as many tokens, of ternary weights half as many: with more, preparing in every block takes longer than a
// launch that prepares once.
template <typename F>
constexpr int kMostClusterColumns = 64 / (32 / F::kPerWord);

// Calls f with the number of columns, a constant.
template <typename F, typename T, typename Function>
auto with_cluster_columns(int64_t tokens, Function&& f) {
  constexpr int kPlanes = FusedFormat<F, T>::kPlanes;
  if constexpr (kPlanes <= 16) {
    if (tokens == 1) return f(std::integral_constant<int, 16>());
  }
  return f(std::integral_constant<int, 64>());
}

// Two blocks of a cluster, or four where rows are few and processors would idle, or are many; as measured on an H200.
// The nearest number that fits, fewer first.
template <typename F, typename T>
BitClusterPlan choose_cluster(const TokenSource& s, const Weights& w) {
  constexpr int64_t kFewRows = 64 * kBitMmaRows;
  constexpr int64_t kManyRows = 256 * kBitMmaRows;
  return with_cluster_columns<F, T>(s.M, [&](auto columns) {
    const int wanted = w.rows <= kFewRows || w.rows > kManyRows ? 2 : 1;
    for (int parts_log2 = wanted; parts_log2 >= 0; --parts_log2) {
      const BitClusterPlan p = cluster_plan<F, T, columns>(s, w, parts_log2);
      if (p.fits) return p;
    }
    BitClusterPlan p;
    for (int parts_log2 = wanted + 1; parts_log2 <= kMostPartsLog2 && !p.fits; ++parts_log2) {
      p = cluster_plan<F, T, columns>(s, w, parts_log2);
    }
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
    if (s.M * Format::kPlanes > kMostClusterColumns<F>) return;
    if (s.K % kRun != 0 || !aligned(s.x, kRunBytes) || !aligned(s.scale, 16) || !aligned(s.shift, 16)) return;
    plan = choose_cluster<F, T>(s, w);
  });
#endif
  return plan;
}

template <typename F>
void run_cluster(const TokenSource& s, const Weights& w, const Epilogue& e, cudaStream_t stream) {
  dispatch_float(s.dtype, [&](auto t) {
    using T = decltype(t);
    with_cluster_columns<F, T>(
        s.M, [&](auto columns) { run_cluster<F, T, columns>(s, w, e, choose_cluster<F, T>(s, w), stream); });
  });
}

}  // namespace bitkernels::cuda
