// How many blocks take a handful of tokens, and in which clusters.
#pragma once

#include <array>

#include "fused.cuh"

namespace bitkernels::cuda {

template <typename F, typename T>
constexpr int kMostFusedTokens = 128 / FusedFormat<F, T>::kPlanes;

struct FusedPlan {
  int64_t tiles, clusters, part;
  int parts_log2;
  size_t ring_bytes, plane_bytes, shared_bytes;
  bool fits;
};

// Clusters of 1, 2, 4 and 8 blocks that the card runs at once, a block having a processor to itself. Processors come in
// groups whose sizes differ from card to card, so that not all of them may find a place in a cluster of 4 or 8.
template <typename... Params>
int clusters_at_once(void (*kernel)(Params...), int parts_log2, int threads) {
  static const std::array<int, 4> known = [&] {
    const int shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / 2 + 1024;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    std::array<int, 4> clusters{device_attribute(cudaDevAttrMultiProcessorCount)};
    for (int i = 1; i < 4; ++i) {
      cudaLaunchAttribute attribute = {};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {1u << i, 1, 1};
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(clusters[0] >> i << i);
      config.blockDim = dim3(threads);
      config.dynamicSmemBytes = shared;
      config.attrs = &attribute;
      config.numAttrs = 1;
      check(cudaOccupancyMaxActiveClusters(&clusters[i], kernel, &config));
    }
    return clusters;
  }();
  return known[parts_log2];
}

template <typename F, typename T, int kColumns, BlockStep kStep>
FusedPlan fused_plan(int64_t N, int64_t chunks, int parts_log2) {
  FusedPlan p;
  p.parts_log2 = parts_log2;
  p.tiles = ceil_div(N, kBitMmaRows);
  const int64_t at_once = clusters_at_once(fused_kernel<F, T, kColumns, true, kStep>, parts_log2, kFusedThreads);
  const int64_t wanted = at_once * ceil_div(p.tiles, at_once * kMostFusedTiles);
  p.clusters = p.tiles < wanted ? p.tiles : wanted;
  p.part = chunks > 0 ? ceil_div(chunks, int64_t(1) << parts_log2) : 1;
  p.plane_bytes = size_t(ceil_div(p.part, kBitMmaChunks)) * kBitMmaChunks * plane_pitch(kColumns);
  const int64_t most_tiles = ceil_div(p.tiles, p.clusters);
  // Shared memory that no warpgroup needs is left to the next kernel.
  p.ring_bytes = kRingBytes * (most_tiles < kFusedGroups ? most_tiles : kFusedGroups);
  const int64_t partials = ceil_div(most_tiles, int64_t(1) << parts_log2) << parts_log2;
  p.shared_bytes = kPanelAlignment + p.ring_bytes + p.plane_bytes +
                   size_t(partials) * kBitMmaRows * sizeof(float) * (kColumns / FusedFormat<F, T>::kPlanes);
  // More than half of a processor's, so that blocks which start while another kernel still runs spread over all of them
  // and do not share the first that have room. A step's output projection leaves that room to the next input
  // projection.
  const size_t alone = size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)) / 2 + 1024;
  if (kStep == BlockStep::kIn && p.shared_bytes < alone) p.shared_bytes = alone;
  constexpr size_t kStatic = 12288;  // room for the kernel's own shared variables
  p.fits = p.part * kChunkWords * F::kPerWord <= kMostFusedPart &&
           p.shared_bytes + kStatic <= size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  return p;
}

inline FusedArgs fused_args(const TokenSource& s, const Weights& w, const Epilogue& e, const FusedPlan& p) {
  FusedArgs args = {};
  args.x = s.x;
  args.scale = s.scale;
  args.shift = s.shift;
  args.packed = w.packed;
  args.e = e;
  args.K = static_cast<int>(s.K);
  args.words = static_cast<int>(w.words);
  args.tokens = static_cast<int>(s.M);
  args.tiles = static_cast<int>(p.tiles / p.clusters);
  args.extra = static_cast<int>(p.tiles % p.clusters);
  args.parts_log2 = p.parts_log2;
  args.ring_bytes = static_cast<int>(p.ring_bytes);
  args.plane_bytes = static_cast<int>(p.plane_bytes);
  args.has_plain = s.has_plain;
  args.part = static_cast<int>(p.part);
  args.width = args.part < kStageChunks ? args.part : kStageChunks;
  args.width_inverse = (1 << 16) / args.width + 1;
  return args;
}

inline Grid fused_grid(const FusedPlan& p, BlockStep step) {
  const bool in_chain = step != BlockStep::kNone;
  Grid grid{dim3(static_cast<unsigned>(p.clusters << p.parts_log2)), kFusedThreads, p.shared_bytes, in_chain};
  grid.cluster = 1 << p.parts_log2;
  grid.beside_previous = in_chain;
  return grid;
}

// Whether runs of activations, and of their scales, are vectors.
template <typename F, typename T>
bool fused_vectors(const TokenSource& s, const Weights& w) {
  constexpr int kRun = FusedFormat<F, T>::kPerLane;
  return w.vector && s.K % kRun == 0 && aligned(s.x, 16) && aligned(s.scale, 16) && aligned(s.shift, 16);
}

template <typename F, typename T, int kColumns>
void run_fused(const TokenSource& s, const Weights& w, const Epilogue& e, const FusedPlan& p, cudaStream_t stream) {
  launch(fused_vectors<F, T>(s, w) ? fused_kernel<F, T, kColumns, true> : fused_kernel<F, T, kColumns, false>,
         fused_grid(p, BlockStep::kNone), stream, fused_args(s, w, e, p));
}

// Calls f with the number of columns, a constant.
template <typename F, typename T, typename Function>
auto with_fused_columns(int64_t tokens, Function&& f) {
  constexpr int kPlanes = FusedFormat<F, T>::kPlanes;
  if constexpr (kPlanes <= 16) {
    if (tokens == 1) return f(std::integral_constant<int, 16>());
  }
  return tokens * kPlanes <= 64 ? f(std::integral_constant<int, 64>()) : f(std::integral_constant<int, 128>());
}

// Blocks of a cluster, as measured on an H200. More of them have less of the activations to prepare, and more to add
// up: two, but four or eight where rows are few and processors would idle, and four where rows are many and more than
// one token is to be prepared. Then as many as it takes for the activations to fit in shared memory.
template <typename F, typename T, int kColumns, BlockStep kStep = BlockStep::kNone>
FusedPlan choose_fused(int64_t tokens, int64_t N, int64_t chunks) {
  constexpr int64_t kFewTiles = 64;
  constexpr int64_t kManyTiles = 256;
  const int64_t tiles = ceil_div(N, kBitMmaRows);
  int parts_log2 = 1;
  if (tiles <= kFewTiles) parts_log2 = tokens == 1 ? 2 : 3;
  if (tiles > kManyTiles && tokens > 1) parts_log2 = 2;
  FusedPlan p = fused_plan<F, T, kColumns, kStep>(N, chunks, parts_log2);
  while (!p.fits && ++parts_log2 <= kMostFusedPartsLog2) p = fused_plan<F, T, kColumns, kStep>(N, chunks, parts_log2);
  return p;
}

template <typename F, typename T>
bool fused_applies(const TokenSource& s, const Weights& w) {
  const int64_t tokens = s.M < kMostFusedTokens<F, T> ? s.M : kMostFusedTokens<F, T>;
  return with_fused_columns<F, T>(tokens, [&](auto columns) {
    return choose_fused<F, T, columns>(tokens, w.rows, ceil_div(w.words, kChunkWords)).fits;
  });
}

// The instructions exist in compute capability 9.0 alone, and in code built for 9.0a.
template <typename F>
bool fused_applies(const TokenSource& s, const Weights& w) {
#ifdef BITKERNELS_SM90A
  if (s.M > kMostTokens || device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) return false;
  bool applies = false;
  dispatch_float(s.dtype, [&](auto t) { applies = fused_applies<F, decltype(t)>(s, w); });
  return applies;
#else
  return false;
#endif
}

template <typename F>
void run_fused(const TokenSource& source, const Weights& w, const Epilogue& epilogue, cudaStream_t stream) {
  dispatch_float(source.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t m = 0; m < source.M; m += kMostFusedTokens<F, T>) {
      TokenSource s = source;
      Epilogue e = epilogue;
      s.x = static_cast<const T*>(source.x) + m * source.K;
      s.M = source.M - m < kMostFusedTokens<F, T> ? source.M - m : kMostFusedTokens<F, T>;
      e.out = static_cast<T*>(epilogue.out) + m * epilogue.columns;
      with_fused_columns<F, T>(s.M, [&](auto columns) {
        run_fused<F, T, columns>(s, w, e, choose_fused<F, T, columns>(s.M, w.rows, ceil_div(w.words, kChunkWords)),
                                 stream);
      });
    }
  });
}

}  // namespace bitkernels::cuda
