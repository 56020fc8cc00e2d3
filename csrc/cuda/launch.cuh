// Launching: one place, so that every kernel states its grid, shared memory and stream the same way.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace bitkernels::cuda {

struct Grid {
  dim3 blocks;
  int threads;
  size_t shared_bytes = 0;
  // The kernel may start while the one before it still runs: it reads nothing that one writes until
  // it has called wait_for_previous_kernel(). Takes effect from compute capability 9.0 on.
  bool overlaps_previous = false;
  // Blocks that share a cluster.
  int cluster = 1;
  // Its blocks are to share processors with those of the kernel before. A processor divides its memory between shared
  // memory and cache anew only when it is idle, so all such kernels want the most shared memory.
  bool beside_previous = false;
  // All blocks run at once, so that they can wait for each other; more than fit are an error.
  bool together = false;
};

// Thrown here, because the CUDA runtime inside this library keeps errors that torch's runtime never sees.
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("bitkernels: ") + cudaGetErrorString(error));
}

// Remembered, as a plan of one call asks a hundred times.
inline int device_attribute(cudaDeviceAttr attribute) {
  constexpr int kDevices = 64, kAttributes = 256, kKnown = 1 << 30;
  static std::atomic<int> known[kDevices][kAttributes];
  int device = 0;
  check(cudaGetDevice(&device));
  const bool held = device < kDevices && attribute < kAttributes;
  if (held) {
    const int value = known[device][attribute].load(std::memory_order_relaxed);
    if (value & kKnown) return value & ~kKnown;
  }
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device));
  if (held && value >= 0 && value < kKnown) known[device][attribute].store(value | kKnown, std::memory_order_relaxed);
  return value;
}

// Whether kernels of Hopper's own instructions run: where the library holds code for sm_90a, and on that alone.
inline bool on_hopper() {
#ifdef BITKERNELS_SM90A
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
#else
  return false;
#endif
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const Grid& grid, cudaStream_t stream, const Args&... args) {
  constexpr size_t kSharedWithoutOptIn = 32 * 1024;  // 48 KB with what the kernel declares itself
  if (grid.shared_bytes > kSharedWithoutOptIn) {
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes)));
  }
  if (grid.beside_previous) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[3] = {};
  config.attrs = attributes;
  if (grid.overlaps_previous && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  if (grid.together) {
    cudaLaunchAttribute& together = attributes[config.numAttrs++];
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

// Blocks for `items` of work taken in grid-stride loops.
inline unsigned blocks_for(int64_t items, int64_t per_block, int64_t most = 1 << 20) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

}  // namespace bitkernels::cuda
