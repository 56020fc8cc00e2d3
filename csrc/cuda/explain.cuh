// What forward.cuh and the plans it calls decide, as text.
#pragma once

#include "forward.cuh"

namespace bitkernels::cuda {

template <typename F>
std::string explain_fused(const TokenSource& s, const Weights& w) {
  std::string text;
  dispatch_float(s.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t tokens = std::min<int64_t>(s.M, kMostFusedTokens<F, T>);
    const FusedPlan plan = with_fused_columns<F, T>(tokens, [&](auto columns) {
      return choose_fused<F, T, columns>(tokens, w.rows, ceil_div(w.words, kChunkWords));
    });
    text = "fused: single-bit products, " + std::to_string(ceil_div(s.M, kMostFusedTokens<F, T>)) +
           " launch(es) of up to " + std::to_string(kMostFusedTokens<F, T>) + " tokens; " +
           std::to_string(plan.clusters) + " clusters of " + std::to_string(1 << plan.parts_log2) +
           " block(s) that split K";
  });
  return text;
}

template <typename F>
std::string explain_cluster(const TokenSource& s, const Weights& w) {
  const BitClusterPlan plan = plan_cluster<F>(s, w);
  return "cluster: single-bit products in one launch; " + std::to_string(plan.clusters) + " clusters of " +
         std::to_string(1 << plan.parts_log2) + " block(s) that split K, " + std::to_string(plan.tiles_of_cluster) +
         " tile(s) of " + std::to_string(plan.tile_rows) + " rows each";
}

template <typename F>
std::string explain_warpgroup(const TokenSource& s, const Weights& w) {
  const Product q{s.dtype, s.scale != nullptr, s.M, w.rows, s.K};
  return with_operand<F>(q, [&](auto operand, auto scales, auto) {
    using Operand = typename decltype(operand)::type;
    const Plan plan = plan_of<Operand>(scales, q);
    std::string text = "warpgroup: ";
    with_tile<Operand>(plan.tile, [&](auto tile) {
      text += "tiles of " + std::to_string(tile.kRows) + " rows times " + std::to_string(tile.kTokens) + " tokens, " +
              std::to_string(plan.blocks) + " block(s) to a tile";
      if (plan.cut.tiles) text += "; the last " + std::to_string(plan.cut.tiles) + " are cut between blocks";
    });
    if (std::is_same_v<Operand, PairOperand>) {
      text += "; a kernel before makes sums and differences of pairs of columns, of which a sign needs one";
    } else if (F::kInteger) {
      text += "; activations are quantised by a kernel before";
    } else if (activation_rows<Operand>(s.x, s.M, s.K).bytes) {
      text += "; activations are copied first: K is no multiple of 8";
    }
    if (w.rows % 8 != 0) text += "; outputs leave one by one: N is no multiple of 8";
    return text;
  });
}

template <typename F>
std::string explain_bits(const TokenSource& s, const Weights& w) {
  const BitPlan plan = plan_bits<F>(s.dtype, s.M, w.rows, s.K);
  return "bits: planes of bits from a kernel before, then single-bit products; tiles of " +
         std::to_string(plan.row_groups * kBitMmaRows) + " rows times " + std::to_string(plan.columns) + " planes";
}

template <typename F>
std::string explain_prepared(const TokenSource& s, const Weights& w) {
  const Choice choice = choose<F>(prepared<F>(s.M, s.K, s.dtype, nullptr), w.rows);
  std::string text;
  switch (choice.kernel) {
    case Kernel::kSkinny8: text = "skinny: 16 rows times 8 rows of activations"; break;
    case Kernel::kSkinny16: text = "skinny: 16 rows times 16 rows of activations"; break;
    case Kernel::kSkinny32: text = "skinny: 32 rows times 32 rows of activations"; break;
    case Kernel::kNarrow: text = "tiled: 128 rows times 64 rows of activations"; break;
    case Kernel::kWide: text = "tiled: 128 rows times 128 rows of activations"; break;
  }
  if (choice.parts > 1) text += ", K in " + std::to_string(choice.parts) + " parts";
  text += "; activations are prepared by a kernel before; slower than others of this size, because ";
  if (!on_hopper()) return text + "this is no GPU of compute capability 9.0, or the library holds no code for 9.0a";
  if (s.dtype == DType::kFloat32) {
    return text + "the faster kernels take fp32 activations of up to " + std::to_string(kMostBitTokens) +
           " tokens and " + std::to_string(kMostFusedPart) + " columns";
  }
  return text + "a table of column scales for K = " + std::to_string(s.K) + " is too large for shared memory";
}

template <typename F>
std::string explain_forward(const TokenSource& s, const Weights& w) {
  switch (choose_on_hopper<F>(s, w)) {
    case HopperKernel::kCluster: return explain_cluster<F>(s, w);
    case HopperKernel::kFused: return explain_fused<F>(s, w);
    case HopperKernel::kBits: return explain_bits<F>(s, w);
    case HopperKernel::kWarpgroup: return explain_warpgroup<F>(s, w);
    case HopperKernel::kNone: break;
  }
  return explain_prepared<F>(s, w);
}

}  // namespace bitkernels::cuda
