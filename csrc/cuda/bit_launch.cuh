// Few tokens as planes of bits: which tile, how many blocks share one, and the two launches.
#pragma once

#include "bit_matmul.cuh"
#include "fused_launch.cuh"

namespace bitkernels::cuda {

constexpr int64_t kMostBitTokens = 256;

struct BitPlan {
  int columns;     // planes of the tokens of a tile
  int row_groups;  // of 64 rows
  int64_t cycles;  // expected, the start included
};

// Processor cycles on an H200, the first measured and the others fitted to the times of calls: of the products of 64
// rows with 256 columns of K, of what surrounds a tile of 256 planes, and until the first tile has its activations,
// of which more tokens take longer.
// Besides, a processor takes in so many bytes a cycle.
constexpr int bit_step_cycles(int columns) { return columns <= 16 ? 20 : columns / 2; }
constexpr int kBitRestCycles[] = {1200, 1600, 3100};  // by groups of rows
constexpr int kBitStartCycles = 7000;
constexpr int kBitTokenCycles = 16;
constexpr int kBytesPerCycle = 40;

// The tile of least cost: rounds of tiles over the processors, times what a tile costs.
template <typename F, typename T>
BitPlan plan_bits(int64_t M, int64_t N, int64_t K, int processors) {
  constexpr int kPlanes = FusedFormat<F, T>::kPlanes;
  constexpr int64_t kStepColumns = kBitMmaChunks * kChunkBits / (32 / F::kPerWord);
  BitPlan best{256, 0, INT64_MAX};
  for (const int columns : {128, 64, 16}) {
    if (M * kPlanes <= columns) best.columns = columns;
  }
  for (int row_groups = 1; row_groups <= 3; ++row_groups) {
    const int64_t tiles = ceil_div(N, row_groups * kBitMmaRows) * ceil_div(M * kPlanes, best.columns);
    const int64_t products = row_groups * bit_step_cycles(best.columns);
    const int64_t copies = (row_groups * kBitMmaRows + best.columns) * kBitMmaChunks * kChunkBytes / kBytesPerCycle;
    const int64_t tile = ceil_div(K, kStepColumns) * (products > copies ? products : copies) +
                         kBitRestCycles[row_groups - 1] * best.columns / 256;
    const int64_t cycles = kBitStartCycles + M * kBitTokenCycles + ceil_div(tiles, processors) * tile;
    if (cycles < best.cycles) best = {best.columns, row_groups, cycles};
  }
  return best;
}

struct PlaneLayout {
  int64_t groups, chunks, bytes, tokens;
};

template <typename F, typename T>
PlaneLayout plane_layout(int64_t M, int64_t K, int columns) {
  constexpr int kPlanes = FusedFormat<F, T>::kPlanes;
  PlaneLayout l;
  l.groups = ceil_div(M * kPlanes, columns);
  l.chunks = ceil_div(K, kChunkBits / (32 / F::kPerWord) * kBitMmaChunks) * kBitMmaChunks;
  l.bytes = l.groups * l.chunks * columns * kChunkBytes;
  l.tokens = l.groups * (columns / kPlanes);
  return l;
}

// kNormedSum: with what `step` says around it; rows are whole vectors then.
template <typename F, typename T, class Tile, bool kNormedSum = false>
void run_bit_tile(const TokenSource& s, const Weights& w, const Epilogue& e, const NormedSum& step, void* workspace,
                  cudaStream_t stream) {
  using Format = FusedFormat<F, T>;
  constexpr int kTokens = Tile::kColumns / Format::kPlanes;
  constexpr int kRun = Format::kPerLane;
  constexpr size_t kRunBytes = kRun * sizeof(T) < 16 ? kRun * sizeof(T) : 16;
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const PlaneLayout layout = plane_layout<F, T>(s.M, s.K, Tile::kColumns);
  uint8_t* planes = static_cast<uint8_t*>(workspace);
  PlaneToken* tokens = reinterpret_cast<PlaneToken*>(planes + layout.bytes);

  PlaneArgs p;
  p.x = s.x;
  p.scale = s.scale;
  p.shift = s.shift;
  p.planes = planes;
  p.tokens = tokens;
  p.K = static_cast<int>(s.K);
  p.M = static_cast<int>(s.M);
  p.chunks = static_cast<int>(layout.chunks);
  p.group_log2 = 0;
  while (1 << p.group_log2 < kTokens) ++p.group_log2;
  p.has_plain = s.has_plain;
  const bool vectors = s.K % kRun == 0 && aligned(s.x, kRunBytes) && aligned(s.scale, 16) && aligned(s.shift, 16);
  const int64_t steps = layout.chunks / kBitMmaChunks;
  const int threads = static_cast<int>(steps < 32 ? 32 * steps : 1024);
  Grid grid{dim3(static_cast<unsigned>(layout.tokens)), threads, 0, kNormedSum};
  grid.beside_previous = kNormedSum;
  if constexpr (kNormedSum) {
    p.norm = step.norm;
    p.eps = step.eps;
    p.weights = {w.packed, nullptr, 1, 0, 4 * w.words * w.rows, 1};
    launch(prepare_planes_kernel<F, T, true, true>, grid, stream, p);
  } else {
    launch(vectors ? prepare_planes_kernel<F, T, true> : prepare_planes_kernel<F, T, false>, grid, stream, p);
  }

  constexpr size_t kStatic = 2048;
  const size_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStatic - kPanelAlignment;
  BitMatmulArgs a;
  if (w.vector) a.weights = matrix_map<uint8_t>(w.packed, w.rows, 4 * w.words, Tile::kRows);
  a.packed = w.packed;
  a.planes = planes;
  a.tokens = tokens;
  a.e = e;
  a.words = static_cast<int>(w.words);
  a.M = p.M;
  a.chunks = p.chunks;
  a.token_groups = static_cast<int>(layout.groups);
  a.row_tiles = static_cast<int>(ceil_div(w.rows, Tile::kRows));
  a.panels = static_cast<int>(ceil_div(a.chunks, kPanelChunks));
  const int64_t tiles = a.row_tiles * layout.groups;
  const int64_t blocks = tiles < processors ? tiles : processors;
  a.row_step = static_cast<int>(blocks / layout.groups);
  a.group_step = static_cast<int>(blocks % layout.groups);
  const int64_t panels = a.panels * ceil_div(tiles, blocks);
  const int64_t fit = most / Tile::kStageBytes;
  a.stages = static_cast<int>(fit < kMostBitStages ? fit : kMostBitStages);
  if (panels < a.stages) a.stages = static_cast<int>(panels);
  a.residual = step.residual;
  grid.blocks = dim3(static_cast<unsigned>(blocks));
  grid.threads = Tile::kThreads;
  grid.shared_bytes = kPanelAlignment + size_t(a.stages) * Tile::kStageBytes;
  grid.overlaps_previous = true;
  if constexpr (kNormedSum) {
    launch(bit_matmul_kernel<F, T, Tile, true, true>, grid, stream, a);
  } else {
    launch(w.vector ? bit_matmul_kernel<F, T, Tile, true> : bit_matmul_kernel<F, T, Tile, false>, grid, stream, a);
  }
}

template <typename F, typename T, typename Function>
void with_bit_tile(const BitPlan& plan, Function&& f) {
  constexpr int kLimbs = FusedFormat<F, T>::kLimbs;
  const auto with_rows = [&](auto columns) {
    if (plan.row_groups == 1) return f(BitTile<columns, 1, kLimbs>());
    if (plan.row_groups == 2) return f(BitTile<columns, 2, kLimbs>());
    return f(BitTile<columns, 3, kLimbs>());
  };
  if constexpr (kLimbs == 1) {
    if (plan.columns == 16) return with_rows(std::integral_constant<int, 16>());
  }
  switch (plan.columns) {
    case 64: return with_rows(std::integral_constant<int, 64>());
    case 128: return with_rows(std::integral_constant<int, 128>());
    default: return with_rows(std::integral_constant<int, 256>());
  }
}

// Sums of a token are 32-bit integers, whatever the order.
inline bool bits_apply(int64_t M, int64_t K) {
#ifdef BITKERNELS_SM90A
  return M <= kMostBitTokens && K > 0 && K <= kMostFusedPart &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
#else
  return false;
#endif
}

template <typename F>
BitPlan plan_bits(DType dtype, int64_t M, int64_t N, int64_t K) {
  BitPlan plan;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  dispatch_float(dtype, [&](auto t) { plan = plan_bits<F, decltype(t)>(M, N, K, processors); });
  return plan;
}

template <typename F>
int64_t bits_workspace(DType dtype, int64_t M, int64_t N, int64_t K) {
  int64_t bytes = 0;
  const int columns = plan_bits<F>(dtype, M, N, K).columns;
  dispatch_float(dtype, [&](auto t) {
    const PlaneLayout layout = plane_layout<F, decltype(t)>(M, K, columns);
    bytes = layout.bytes + layout.tokens * sizeof(PlaneToken);
  });
  return bytes;
}

template <typename F>
void run_bits(const TokenSource& s, const Weights& w, const Epilogue& e, void* workspace, cudaStream_t stream) {
  dispatch_float(s.dtype, [&](auto t) {
    using T = decltype(t);
    with_bit_tile<F, T>(plan_bits<F>(s.dtype, s.M, w.rows, s.K),
                        [&](auto tile) { run_bit_tile<F, T, decltype(tile)>(s, w, e, {}, workspace, stream); });
  });
}

}  // namespace bitkernels::cuda
