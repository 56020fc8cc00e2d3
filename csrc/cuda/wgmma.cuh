// The asynchronous tensor-core product of a warpgroup (sm_90a): d[64, n] += a[64, k] b[k, n]; of single bits
// d[64, n] += popcount(a[64, 256] & b[n, 256]), see bit_mma.cuh.
//
// a comes from registers, with the fragment layout of mma() in ptx.cuh, warp w of the four holding rows 16 w to
// 16 w + 15; b is a tile in shared memory with the 128-byte swizzle, K-major (its rows are columns of b) for wgmma(),
// and for wgmma_rows() as it stands (its rows are rows of b). With g = lane / 4 and t = lane % 4, d[4 i + c] is row
// g + 8 (c / 2), column 8 i + 2 t + c % 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace bitkernels::cuda {

// Before the first product, and whenever registers it reads were written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` committed groups are under way.
template <int pending>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Nothing reads these sums before this point: the compiler does not see that the products are still at work.
template <int n>
__device__ __forceinline__ void pin(float (&sums)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
template <int n>
__device__ __forceinline__ void pin(int (&sums)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}

// Left operands are read while the products are at work, and the compiler takes their registers for free once the
// products are issued: this keeps them until here, after the wait.
template <int steps>
__device__ __forceinline__ void pin(uint32_t (&a)[steps][4]) {
#pragma unroll
  for (int k = 0; k < steps; ++k) {
    asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
  }
}

// A tile of rows of 128 bytes, groups of eight rows 1024 bytes apart.
__device__ inline uint64_t wgmma_descriptor(uint32_t shared_address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kGroupPitch = 1024 / 16;
  return kSwizzle128 | kGroupPitch << 32 | 1ull << 16 | (shared_address & 0x3ffff) >> 4;
}

// Of wgmma_rows(): such tiles side by side, each 64 columns of b, `box_bytes` apart.
__device__ inline uint64_t wgmma_rows_descriptor(uint32_t shared_address, uint32_t box_bytes) {
  return wgmma_descriptor(shared_address) + (uint64_t(box_bytes / 16 - 1) << 16);
}

// clang-format off
// The operand list of n columns is made of runs of eight registers; the operands that follow are counted on.
#define BITKERNELS_D8(i, c) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define BITKERNELS_L16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define BITKERNELS_O16(c) BITKERNELS_D8(0, c)
#define BITKERNELS_L32 BITKERNELS_L16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define BITKERNELS_O32(c) BITKERNELS_O16(c), BITKERNELS_D8(8, c)
#define BITKERNELS_L48 BITKERNELS_L32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define BITKERNELS_O48(c) BITKERNELS_O32(c), BITKERNELS_D8(16, c)
#define BITKERNELS_L64 BITKERNELS_L48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define BITKERNELS_O64(c) BITKERNELS_O48(c), BITKERNELS_D8(24, c)
#define BITKERNELS_L80 BITKERNELS_L64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define BITKERNELS_O80(c) BITKERNELS_O64(c), BITKERNELS_D8(32, c)
#define BITKERNELS_L96 BITKERNELS_L80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define BITKERNELS_O96(c) BITKERNELS_O80(c), BITKERNELS_D8(40, c)
#define BITKERNELS_L112 BITKERNELS_L96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define BITKERNELS_O112(c) BITKERNELS_O96(c), BITKERNELS_D8(48, c)
#define BITKERNELS_L128 BITKERNELS_L112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define BITKERNELS_O128(c) BITKERNELS_O112(c), BITKERNELS_D8(56, c)
#define BITKERNELS_L144 BITKERNELS_L128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define BITKERNELS_O144(c) BITKERNELS_O128(c), BITKERNELS_D8(64, c)
#define BITKERNELS_L160 BITKERNELS_L144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define BITKERNELS_O160(c) BITKERNELS_O144(c), BITKERNELS_D8(72, c)
#define BITKERNELS_L176 BITKERNELS_L160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define BITKERNELS_O176(c) BITKERNELS_O160(c), BITKERNELS_D8(80, c)
#define BITKERNELS_L192 BITKERNELS_L176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define BITKERNELS_O192(c) BITKERNELS_O176(c), BITKERNELS_D8(88, c)
#define BITKERNELS_L208 BITKERNELS_L192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define BITKERNELS_O208(c) BITKERNELS_O192(c), BITKERNELS_D8(96, c)
#define BITKERNELS_L224 BITKERNELS_L208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define BITKERNELS_O224(c) BITKERNELS_O208(c), BITKERNELS_D8(104, c)
#define BITKERNELS_L240 BITKERNELS_L224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define BITKERNELS_O240(c) BITKERNELS_O224(c), BITKERNELS_D8(112, c)
#define BITKERNELS_L256 BITKERNELS_L240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define BITKERNELS_O256(c) BITKERNELS_O240(c), BITKERNELS_D8(120, c)
#define BITKERNELS_L216 BITKERNELS_L208 ", %104, %105, %106, %107"
#define BITKERNELS_O216(c) BITKERNELS_O208(c), c(d[104]), c(d[105]), c(d[106]), c(d[107])
#define BITKERNELS_WGMMA_16_OF(name, n, modifiers, a0, a1, a2, a3, desc, flag)                                   \
  BITKERNELS_WGMMA_OF(name, __nv_bfloat16, float, "+f", n, 16, "f32.bf16.bf16", modifiers, a0, a1, a2, a3, desc, flag) \
  BITKERNELS_WGMMA_OF(name, __half, float, "+f", n, 16, "f32.f16.f16", modifiers, a0, a1, a2, a3, desc, flag)
#define BITKERNELS_WGMMA_16(n, a0, a1, a2, a3, desc, flag) \
  BITKERNELS_WGMMA_16_OF(wgmma, n, ", p, 1, 1, 0", a0, a1, a2, a3, desc, flag)
#define BITKERNELS_WGMMA_ROWS(n, a0, a1, a2, a3, desc, flag) \
  BITKERNELS_WGMMA_16_OF(wgmma_rows, n, ", p, 1, 1, 1", a0, a1, a2, a3, desc, flag)
#define BITKERNELS_WGMMA_8(n, a0, a1, a2, a3, desc, flag) \
  BITKERNELS_WGMMA_OF(wgmma, int8_t, int, "+r", n, 32, "s32.u8.s8", ", p", a0, a1, a2, a3, desc, flag)
// The first argument only chooses the type; without `accumulate`, d starts from zero.
#define BITKERNELS_WGMMA_OF(name, T, D, c, n, k, types, modifiers, a0, a1, a2, a3, desc, flag)                          \
  __device__ __forceinline__ void name(T, D (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {   \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #flag ", 0;\n"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k" #k "." types " {" BITKERNELS_L##n "}, "               \
                 "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #desc modifiers ";}\n"                             \
                 : BITKERNELS_O##n(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));     \
  }
BITKERNELS_WGMMA_16(16, 8, 9, 10, 11, 12, 13)
BITKERNELS_WGMMA_16(32, 16, 17, 18, 19, 20, 21)
BITKERNELS_WGMMA_16(64, 32, 33, 34, 35, 36, 37)
BITKERNELS_WGMMA_16(96, 48, 49, 50, 51, 52, 53)
BITKERNELS_WGMMA_16(128, 64, 65, 66, 67, 68, 69)
BITKERNELS_WGMMA_16(176, 88, 89, 90, 91, 92, 93)
BITKERNELS_WGMMA_16(216, 108, 109, 110, 111, 112, 113)
BITKERNELS_WGMMA_16(256, 128, 129, 130, 131, 132, 133)
BITKERNELS_WGMMA_ROWS(64, 32, 33, 34, 35, 36, 37)
BITKERNELS_WGMMA_ROWS(128, 64, 65, 66, 67, 68, 69)
BITKERNELS_WGMMA_8(16, 8, 9, 10, 11, 12, 13)
BITKERNELS_WGMMA_8(32, 16, 17, 18, 19, 20, 21)
BITKERNELS_WGMMA_8(64, 32, 33, 34, 35, 36, 37)
BITKERNELS_WGMMA_8(96, 48, 49, 50, 51, 52, 53)
BITKERNELS_WGMMA_8(128, 64, 65, 66, 67, 68, 69)
BITKERNELS_WGMMA_8(176, 88, 89, 90, 91, 92, 93)
BITKERNELS_WGMMA_8(208, 104, 105, 106, 107, 108, 109)
BITKERNELS_WGMMA_8(256, 128, 129, 130, 131, 132, 133)
// a is [64, 32], of which of every four neighbours one of the first two and one of the last two are not zero. These
// lie as a [64, 16] would; `kept` says which they are: in lanes 2 kept_in and 2 kept_in + 1 of a quad, of columns 0 to 15
// and 16 to 31, two bits a value, of row g and above them of row g + 8.
#define BITKERNELS_WGMMA_PAIRS(n, a0, a1, a2, a3, desc, kept, kept_in, flag)                                            \
  template <int lanes>                                                                                                  \
  __device__ __forceinline__ void wgmma_pairs(float (&d)[n / 2], const uint32_t (&a)[4], uint32_t columns, uint64_t b,  \
                                              int accumulate) {                                                         \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #flag ", 0;\n"                                                       \
                 "wgmma.mma_async.sp.sync.aligned.m64n" #n "k32.f32.f16.f16 {" BITKERNELS_L##n "}, "                    \
                 "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #desc ", %" #kept ", %" #kept_in ", p, 1, 1, 0;}\n"      \
                 : BITKERNELS_O##n("+f")                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(columns), "n"(lanes), "r"(accumulate));      \
  }
BITKERNELS_WGMMA_PAIRS(64, 32, 33, 34, 35, 36, 37, 38, 39)
BITKERNELS_WGMMA_PAIRS(96, 48, 49, 50, 51, 52, 53, 54, 55)
BITKERNELS_WGMMA_PAIRS(128, 64, 65, 66, 67, 68, 69, 70, 71)
BITKERNELS_WGMMA_PAIRS(192, 96, 97, 98, 99, 100, 101, 102, 103)
#undef BITKERNELS_WGMMA_PAIRS
// Both operands in shared memory, each K-major, or as it stands: its rows along the dimension that is summed over.
#define BITKERNELS_WGMMA_SHARED_OF(T, n, types, desc_a, desc_b, flag, rows_a, rows_b)                                   \
  template <int a_rows, int b_rows>                                                                                     \
  __device__ __forceinline__ void wgmma_shared(T, float (&d)[n / 2], uint64_t a, uint64_t b, int accumulate) {          \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #flag ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16." types " {" BITKERNELS_L##n "}, %" #desc_a ", %" #desc_b   \
                 ", p, 1, 1, %" #rows_a ", %" #rows_b ";}\n"                                                           \
                 : BITKERNELS_O##n("+f") : "l"(a), "l"(b), "r"(accumulate), "n"(a_rows), "n"(b_rows));                  \
  }
#define BITKERNELS_WGMMA_SHARED(n, desc_a, desc_b, flag, rows_a, rows_b)                                                \
  BITKERNELS_WGMMA_SHARED_OF(__nv_bfloat16, n, "f32.bf16.bf16", desc_a, desc_b, flag, rows_a, rows_b)                   \
  BITKERNELS_WGMMA_SHARED_OF(__half, n, "f32.f16.f16", desc_a, desc_b, flag, rows_a, rows_b)
BITKERNELS_WGMMA_SHARED(64, 32, 33, 34, 35, 36)
#undef BITKERNELS_WGMMA_SHARED
#undef BITKERNELS_WGMMA_SHARED_OF
// Single bits: a is in shared memory too, and products are counted where both bits are set.
#define BITKERNELS_WGMMA_1(n, desc_a, desc_b, flag)                                                                    \
  __device__ __forceinline__ void wgmma_bits(int (&d)[n / 2], uint64_t a, uint64_t b, int accumulate) {               \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #flag ", 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k256.s32.b1.b1.and.popc {" BITKERNELS_L##n "}, "              \
                 "%" #desc_a ", %" #desc_b ", p;}\n"                                                                  \
                 : BITKERNELS_O##n("+r") : "l"(a), "l"(b), "r"(accumulate));                                           \
  }
BITKERNELS_WGMMA_1(16, 8, 9, 10)
BITKERNELS_WGMMA_1(64, 32, 33, 34)
BITKERNELS_WGMMA_1(128, 64, 65, 66)
BITKERNELS_WGMMA_1(256, 128, 129, 130)
#undef BITKERNELS_WGMMA_1
#undef BITKERNELS_WGMMA_16
#undef BITKERNELS_WGMMA_ROWS
#undef BITKERNELS_WGMMA_16_OF
#undef BITKERNELS_WGMMA_8
#undef BITKERNELS_WGMMA_OF
#undef BITKERNELS_L16
#undef BITKERNELS_O16
#undef BITKERNELS_L32
#undef BITKERNELS_O32
#undef BITKERNELS_L48
#undef BITKERNELS_O48
#undef BITKERNELS_L64
#undef BITKERNELS_O64
#undef BITKERNELS_L80
#undef BITKERNELS_O80
#undef BITKERNELS_L96
#undef BITKERNELS_O96
#undef BITKERNELS_L112
#undef BITKERNELS_O112
#undef BITKERNELS_L128
#undef BITKERNELS_O128
#undef BITKERNELS_L144
#undef BITKERNELS_O144
#undef BITKERNELS_L160
#undef BITKERNELS_O160
#undef BITKERNELS_L176
#undef BITKERNELS_O176
#undef BITKERNELS_L192
#undef BITKERNELS_O192
#undef BITKERNELS_L208
#undef BITKERNELS_O208
#undef BITKERNELS_L224
#undef BITKERNELS_O224
#undef BITKERNELS_L240
#undef BITKERNELS_O240
#undef BITKERNELS_L256
#undef BITKERNELS_O256
#undef BITKERNELS_L216
#undef BITKERNELS_O216
#undef BITKERNELS_D8
// clang-format on

}  // namespace bitkernels::cuda
