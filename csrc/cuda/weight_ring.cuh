// Packed weights on their way through shared memory.
#pragma once

#include "bit_mma.cuh"
#include "conv_step.cuh"
#include "epilogue.cuh"
#include "hopper.cuh"
#include "ptx.cuh"

namespace bitkernels::cuda {

constexpr int kFusedWarps = 16;
constexpr int kFusedThreads = 32 * kFusedWarps;
constexpr int kFusedGroups = kFusedWarps / 4;  // warpgroups, each with tiles of its own

// Weights pass through shared memory in stages of 64 rows times up to 16 chunks of 16 bytes, in panels of eight.
constexpr int kStageChunks = 16;
constexpr int kFusedStages = 2;  // of a warpgroup: 128 KB in flight for the block
constexpr int kChunkWords = 4;
constexpr int kPanelBytes = kBitMmaRows * kPanelRowBytes;
constexpr int kStageBytes = kStageChunks / kPanelChunks * kPanelBytes;
constexpr int kRingBytes = kFusedStages * kStageBytes;  // of a warpgroup

// What is needed first comes first: constants arrive a line at a time.
struct FusedArgs {
  const void* x;
  const float* scale;  // [K] or null
  const float* shift;  // [K] or null
  const uint32_t* packed;
  int K;
  int words;
  int tokens;
  int part;           // chunks of a row for each block of a cluster
  int width;          // chunks of a row in a stage
  int width_inverse;  // 2^16 / width, rounded up
  int tiles;          // of 64 rows: as many for each cluster, one more for the first `extra`
  int extra;
  int parts_log2;  // blocks of a cluster
  int ring_bytes;
  int plane_bytes;
  bool has_plain;
  Epilogue e;
  StepOperands step;  // of the Mamba-2 block
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A warpgroup's stages of every fourth tile of the block. Its threads copy the chunks of a stage in the order of
// memory.
template <bool kAligned>
class WeightRing {
 public:
  __device__ WeightRing(const FusedArgs& args, uint8_t* rings, int group, int tiles, int64_t first_row, int first_chunk,
                        int chunks)
      : args_(args),
        ring_(rings + group * kRingBytes),
        group_(group),
        tiles_(tiles),
        first_row_(first_row),
        first_chunk_(first_chunk),
        chunks_(chunks),
        next_tile_(group) {
    const uint32_t thread = threadIdx.x % 128;
    row_of_thread_ = thread * args.width_inverse >> 16;
    chunk_of_thread_ = thread - row_of_thread_ * args.width;
    from_ = reinterpret_cast<const uint8_t*>(args.packed) + (first_row + row_of_thread_) * 4 * args.words +
            (first_chunk + static_cast<int>(chunk_of_thread_)) * kChunkBytes;
  }

  // Asks for the next stage, if there is one, where the last one released was.
  __device__ void fetch() {
    if (next_tile_ < tiles_) {
      const uint32_t width = args_.width;
      const uint32_t row_bytes = 4 * args_.words;
      const uint32_t row_step = 128 * args_.width_inverse >> 16;
      const uint32_t chunk_step = 128 - row_step * width;
      const int64_t step_bytes = int64_t(row_step) * row_bytes + chunk_step * kChunkBytes;
      const int64_t wrap_bytes = int64_t(row_bytes) - width * kChunkBytes;
      const int64_t tile_row = int64_t(next_tile_) * kBitMmaRows;
      const uint32_t rows = static_cast<uint32_t>(min(args_.e.columns - first_row_ - tile_row, int64_t(kBitMmaRows)));
      const uint32_t count = max(min(chunks_ - next_chunk_, args_.width), 0);
      const uint8_t* from = from_ + tile_row * row_bytes + next_chunk_ * kChunkBytes;
      uint8_t* to = ring_ + next_stage_ * kStageBytes;
      uint32_t chunk = chunk_of_thread_;
#pragma unroll 1
      for (uint32_t row = row_of_thread_; row < rows;) {
        uint8_t* chunk_to = to + chunk / kPanelChunks * kPanelBytes + panel_offset(row, chunk % kPanelChunks);
        if constexpr (kAligned) {
          if (chunk < count) copy_async(chunk_to, from);
        } else {
          // Nothing is written past the end of a row, where activations are zero.
          const int word = (first_chunk_ + next_chunk_ + static_cast<int>(chunk)) * kChunkWords;
          const int left = chunk < count ? args_.words - word : 0;
#pragma unroll
          for (int j = 0; j < kChunkWords; ++j) {
            if (j < left) copy_or_zero<4>(shared_address(chunk_to + 4 * j), from + 4 * j, true);
          }
        }
        row += row_step;
        chunk += chunk_step;
        from += step_bytes;
        if (chunk >= width) {
          chunk -= width;
          ++row;
          from += wrap_bytes;
        }
      }
      next_chunk_ += args_.width;
      if (next_chunk_ >= chunks_) {
        next_chunk_ = 0;
        next_tile_ += kFusedGroups;
      }
      next_stage_ ^= 1;
    }
    commit_copies();
  }

  // The oldest stage, for the tensor cores.
  __device__ const uint8_t* wait() const {
    wait_for_copies<kFusedStages - 1>();
    copy_engine_fence();
    barrier();
    return ring_ + stage_ * kStageBytes;
  }

  // All products of the oldest stage are there: its place is free.
  __device__ void release() {
    if (next_tile_ < tiles_) barrier();
    fetch();
    stage_ ^= 1;
  }

 private:
  __device__ void barrier() const { asm volatile("bar.sync %0, 128;" ::"r"(group_ + 1) : "memory"); }

  const FusedArgs& args_;
  const uint8_t* from_;
  uint8_t* ring_;
  int group_, tiles_;
  int64_t first_row_;
  int first_chunk_, chunks_;
  int next_tile_, next_chunk_ = 0, next_stage_ = 0, stage_ = 0;
  uint32_t row_of_thread_, chunk_of_thread_;
};

#endif

}  // namespace bitkernels::cuda
