// y = epilogue(prepared x times packed weights): which kernel does it.
#pragma once

#include "bit_cluster_launch.cuh"
#include "bit_launch.cuh"
#include "fused_launch.cuh"
#include "skinny.cuh"
#include "tiled.cuh"
#include "warpgroup_forward.cuh"

namespace bitkernels::cuda {

enum class Kernel { kSkinny8, kSkinny16, kSkinny32, kNarrow, kWide };

struct Choice {
  Kernel kernel;
  int parts;  // of K, added up by a second kernel
};

// Rows of activations (twice the tokens for fp32) decide. Up to 32 the matmul is a read of the weights:
// skinny, with as many mma columns as there are rows. Beyond, activations pass through shared memory, 64 or
// 128 rows at a time. A card of `processors` runs two tiles on each; with fewer tiles than processors
// K is split, as long as every part keeps kLeastStages stages to hide its start behind.
inline Choice choose(int64_t rows, int64_t N, int64_t stages, int processors) {
  if (rows <= 8) return {Kernel::kSkinny8, 1};
  if (rows <= 16) return {Kernel::kSkinny16, 1};
  if (rows <= 32) return {Kernel::kSkinny32, 1};
  const bool narrow = rows <= NarrowTile::kTokens;
  const int64_t tiles =
      narrow ? ceil_div(N, NarrowTile::kRows) : ceil_div(N, WideTile::kRows) * ceil_div(rows, WideTile::kTokens);
  constexpr int64_t kLeastStages = 4;
  const int64_t wanted = tiles < processors ? ceil_div(processors, tiles) : 1;
  const int64_t possible = stages / kLeastStages < 1 ? 1 : stages / kLeastStages;
  return {narrow ? Kernel::kNarrow : Kernel::kWide, static_cast<int>(wanted < possible ? wanted : possible)};
}

template <typename F>
Choice choose(const Prepared& x, int64_t N) {
  return choose(x.rows, N, x.units * F::kChunks / WideTile::kChunksPerStage,
                device_attribute(cudaDevAttrMultiProcessorCount));
}

// Enough for any kernel: which one runs also depends on where the tensors lie.
template <typename F>
int64_t forward_workspace(const void* activations, int64_t M, int64_t N, int64_t K, DType dtype, bool by_column) {
  const int64_t bits = bits_apply(M, K) ? bits_workspace<F>(dtype, M, N, K) : 0;
  if (warpgroup_applies(dtype, K, by_column)) {
    const int64_t warpgroup = warpgroup_workspace<F>(activations, {dtype, by_column, M, N, K});
    return bits > warpgroup ? bits : warpgroup;
  }
  const Prepared x = prepared<F>(M, K, dtype, nullptr);
  const Choice choice = choose<F>(x, N);
  const int64_t partial = choice.parts > 1 ? choice.parts * x.rows * N * sizeof(float) : 0;
  const int64_t bytes = prepared_bytes<F>(M, K, dtype) + partial;
  return bits > bytes ? bits : bytes;
}

enum class HopperKernel { kNone, kCluster, kFused, kBits, kWarpgroup };

// Before the table, on Hopper: one launch for a few tokens, in the form that keeps planes in clusters or, where rows
// are no whole vectors, in the fused one: for one token, or for four where rows are so few that processors would idle
// without its split of K. Then products of single bits as long as they are expected to take less than decoding does.
template <typename F>
HopperKernel choose_on_hopper(const TokenSource& s, const Weights& w) {
  constexpr int64_t kFewRows = 64 * kBitMmaRows;
  if (plan_cluster<F>(s, w).fits) return HopperKernel::kCluster;
  const bool bits = bits_apply(s.M, s.K);
  const bool few = s.M == 1 || (s.M <= 4 && w.rows <= kFewRows);
  if ((few || !bits) && fused_applies<F>(s, w)) return HopperKernel::kFused;
  const bool by_column = s.scale != nullptr;
  const bool warpgroup = warpgroup_applies(s.dtype, s.K, by_column);
  if (bits && (!warpgroup || plan_bits<F>(s.dtype, s.M, w.rows, s.K).cycles <
                                 warpgroup_cycles<F>({s.dtype, by_column, s.M, w.rows, s.K}))) {
    return HopperKernel::kBits;
  }
  return warpgroup ? HopperKernel::kWarpgroup : HopperKernel::kNone;
}

// Whether the call becomes a product of pairs of columns.
template <typename F>
bool takes_pairs(const TokenSource& s, const Weights& w) {
  if (choose_on_hopper<F>(s, w) != HopperKernel::kWarpgroup) return false;
  const Product q{s.dtype, s.scale != nullptr, s.M, w.rows, s.K};
  return with_operand<F>(
      q, [](auto operand, auto, auto) { return std::is_same_v<typename decltype(operand)::type, PairOperand>; });
}

template <typename F>
void run_forward(const TokenSource& source, const uint32_t* w_packed, const Epilogue& e, void* workspace,
                 cudaStream_t stream) {
  const int64_t N = e.columns;
  const Weights w = weights(w_packed, N, ceil_div(source.K, F::kPerWord));
  switch (choose_on_hopper<F>(source, w)) {
    case HopperKernel::kCluster: return run_cluster<F>(source, w, e, stream);
    case HopperKernel::kFused: return run_fused<F>(source, w, e, stream);
    case HopperKernel::kBits: return run_bits<F>(source, w, e, workspace, stream);
    case HopperKernel::kWarpgroup: return run_warpgroup_forward<F>(source, w, e, workspace, stream);
    case HopperKernel::kNone: break;
  }
  const Prepared x = prepared<F>(source.M, source.K, source.dtype, workspace);
  prepare_tokens<F>(source, x, stream);
  const Choice choice = choose<F>(x, N);
  void* partial = static_cast<char*>(workspace) + prepared_bytes<F>(source.M, source.K, source.dtype);
  switch (choice.kernel) {
    case Kernel::kSkinny8: return run_skinny<F, 1, 1>(w, x, e, source.M, stream);
    case Kernel::kSkinny16: return run_skinny<F, 2, 1>(w, x, e, source.M, stream);
    case Kernel::kSkinny32: return run_skinny<F, 4, 2>(w, x, e, source.M, stream);
    case Kernel::kNarrow: return run_tiled<F, NarrowTile>(w, x, e, source.M, choice.parts, partial, stream);
    case Kernel::kWide: return run_tiled<F, WideTile>(w, x, e, source.M, choice.parts, partial, stream);
  }
}

}  // namespace bitkernels::cuda
