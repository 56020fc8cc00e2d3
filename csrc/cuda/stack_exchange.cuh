// What kernels whose blocks stay through all layers share: which channels a block has, and how values pass from block
// to block. Every place is written once a step, and holds kUnwritten before, which no value is: who waits for a value
// reads until it is there. There are no flags, so no order between writes is needed, and a hand-over takes as long as
// one write and one read of L2.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitkernels::cuda {

constexpr uint32_t kUnwritten = 0xffffffff;

struct Share {
  int first, count;
};

// Of `items`, what block `block` has.
__host__ __device__ inline Share share_of(int items, int block, int blocks) {
  const int least = items / blocks, more = items % blocks;
  return {block * least + (block < more ? block : more), least + (block < more)};
}

// Octets of what is common: one after the other from the block on that has fewest of the `octets` shared out before.
__host__ __device__ inline Share later_share_of(int items, int octets, int block, int blocks) {
  const int first = (block - octets % blocks + blocks) % blocks;
  return {first, first < items ? (items - 1 - first) / blocks + 1 : 0};
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline bool written(uint32_t v) { return v != kUnwritten; }
__device__ inline bool written(uint2 v) { return written(v.x) && written(v.y); }
__device__ inline bool written(uint4 v) { return written(v.x) && written(v.y) && written(v.z) && written(v.w); }

__device__ inline uint4 load_exchanged(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ inline uint2 load_exchanged(const float2* p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ inline float load_exchanged(const float* p) {
  float v;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
__device__ inline void store_exchanged(void* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ inline void store_exchanged(float2* p, float x, float y) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(x), "f"(y) : "memory");
}

// By a thread: until a value is there.
__device__ inline void wait_for(const float* p) {
  while (!written(__float_as_uint(load_exchanged(p)))) {
  }
}

// Reads shared memory where it stands: what can be read again need not keep a register.
template <typename T>
__device__ T kept(const T& v) {
  return *const_cast<const volatile T*>(&v);
}

// The lane, as news: addresses made of it are made again where they are used, instead of keeping registers.
__device__ inline int lane_again() {
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  return lane;
}

#endif

}  // namespace bitkernels::cuda
