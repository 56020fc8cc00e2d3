// The instructions C++ has no name for, one wrapper each.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitkernels::cuda {

// c[16, 8] += a[16, 16] b[16, 8]; with g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 (first two registers) and 2t + 8, 2t + 9 (last two)
//   b: rows 2t, 2t + 1 (b0) and 2t + 8, 2t + 9 (b1) of column g
//   c: row g, columns 2t and 2t + 1; row g + 8, the same columns.
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of unsigned a[16, 32] and signed b[32, 8] bytes: four columns of a, four rows of b to a register.
__device__ inline void mma(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, in the background.
__device__ inline void copy_async(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's committed groups are under way.
template <int pending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// 2^v to about 22 bits, zero where float32 would need a denormal.
__device__ inline float exp2_fast(float v) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power;
}

constexpr float kLog2E = 1.4426950408889634f;

// Without a division's care for denominators beyond 2^126, as v over infinity is zero too.
__device__ inline float silu(float v) {
  float open;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(open) : "f"(1.0f + exp2_fast(-kLog2E * v)));
  return v * open;
}

// Weights are read once and are written by no kernel in flight: they pass by the L1 cache.
__device__ inline uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Sixteen or eight bytes at once, which the compiler takes apart where they were words before.
__device__ inline void store_vector(void* p, const uint32_t (&v)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

__device__ inline void store_vector(void* p, const uint32_t (&v)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(v[0]), "r"(v[1]) : "memory");
}

// The same of what is not read again soon: it is the first to leave L2.
__device__ inline void store_streaming(void* p, const uint32_t (&v)[4]) {
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

__device__ inline void prefetch_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// The same of many bytes: 16 to a boundary, and a multiple of 16 of them. Memory written meanwhile is not a danger, as
// it is written to L2, too: what is only prefetched may belong to kernels that still run.
__device__ inline void prefetch_to_l2(const void* p, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  if (bytes > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}

__device__ inline void prefetch_to_l2(const void* p, uint32_t bytes, uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  if (bytes > 0) {
    asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(p), "r"(bytes), "l"(policy));
  }
#endif
}

// What is not needed again leaves L2 before other lines, and what is to be there when it is needed, after them.
#if __CUDA_ARCH__ >= 800
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline uint64_t evict_last() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
#endif

// Lets a kernel launched with Grid::overlaps_previous start, once every block has called this.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the kernels before this one have ended and their writes are visible.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace bitkernels::cuda
