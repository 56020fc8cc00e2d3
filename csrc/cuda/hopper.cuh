// What sm_90 adds: barriers that count bytes, the tensor copy engine, clusters. One wrapper each.
#pragma once

#include <cuda.h>

#include "launch.cuh"
#include "types.cuh"

namespace bitkernels::cuda {

// The same in all lanes, which the compiler cannot know: branches on it do not diverge.
__device__ inline int uniform(int v) { return __shfl_sync(0xffffffff, v, 0); }

// Shared memory is addressed by 32-bit integers here, so that the addresses of a stage stay uniform.
using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

__device__ inline void barrier_init(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Initialised barriers become visible to the copy engine and to the cluster.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for as many bytes more.
__device__ inline void barrier_arrive_expecting(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives once the copies this thread has started so far have landed.
__device__ inline void barrier_arrive_after_copies(SharedAddress barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_wait(SharedAddress barrier, int parity) {
  asm volatile(
      "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again;}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

__device__ inline bool barrier_passed(SharedAddress barrier, int parity) {
  int passed;
  asm volatile("{.reg .pred done; mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2; selp.b32 %0, 1, 0, done;}"
               : "=r"(passed)
               : "r"(barrier), "r"(parity)
               : "memory");
  return passed;
}

// kBytes from global to shared memory in the background, or zeros.
template <int kBytes>
__device__ void copy_or_zero(SharedAddress to, const void* from, bool wanted) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(wanted ? kBytes : 0),
                 "n"(kBytes)
                 : "memory");
  }
}

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ inline void load_box(const CUtensorMap* map, SharedAddress to, SharedAddress barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

__device__ inline void load_box(const CUtensorMap* map, SharedAddress to, SharedAddress barrier, int column, int part,
                                int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(part), "r"(row)
      : "memory");
}

// As far as L2.
__device__ inline void prefetch_box(const CUtensorMap* map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row)
               : "memory");
}

// Consecutive bytes, a multiple of 16.
__device__ inline void load_bytes(SharedAddress to, const void* from, int bytes, SharedAddress barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Of a map of tokens, see tokens_map().
__device__ inline void load_tokens(const CUtensorMap* map, SharedAddress to, SharedAddress barrier, int column,
                                   int head, int token, int row) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(token), "r"(row)
      : "memory");
}
__device__ inline void store_tokens(const CUtensorMap* map, SharedAddress from, int column, int head, int token,
                                    int row) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(from), "r"(column), "r"(head), "r"(token), "r"(row)
               : "memory");
}

// Consecutive bytes, a multiple of 16.
__device__ inline void store_bytes(void* to, SharedAddress from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}

// One thread's stores form a group; what they read may be written again once the group has been waited for.
__device__ inline void store_box(const CUtensorMap* map, SharedAddress from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(column), "r"(row)
               : "memory");
}
// Adds to what is there.
__device__ inline void add_box(const CUtensorMap* map, SharedAddress from, int column, int row) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(from), "r"(column), "r"(row)
               : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int pending = 0>
__device__ void wait_for_stores_to_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
__device__ inline void wait_for_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Ordinary writes to shared memory become visible to the copy engine and to wgmma.
__device__ inline void copy_engine_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Two 8 x 8 tiles of 16-bit fragments, transposed: lanes 0..7 (8..15) say where the columns of the first
// (second) go, 16 bytes each.
__device__ inline void store_transposed(SharedAddress to, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second)
               : "memory");
}

// Four 8 x 8 tiles of 16-bit fragments: lanes 8 i to 8 i + 7 say where the rows of the i-th are, 16 bytes each.
__device__ inline void load_matrices(SharedAddress from, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from)
               : "memory");
}
__device__ inline void load_transposed(SharedAddress from, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from)
               : "memory");
}
__device__ inline void store_matrices(SharedAddress to, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v0), "r"(v1), "r"(v2),
               "r"(v3)
               : "memory");
}

// Every block of the cluster has started; orders no memory.
__device__ inline void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

__device__ inline int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The same place in the shared memory of another block of the cluster.
__device__ inline SharedAddress in_block(SharedAddress address, int rank) {
  SharedAddress there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Sixteen bytes to a block of the cluster, counted by a barrier there. Illegal in a launch without clusters.
__device__ inline void send(SharedAddress to, float v0, float v1, float v2, float v3, SharedAddress barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "f"(v0), "f"(v1), "f"(v2), "f"(v3), "r"(barrier)
      : "memory");
}
__device__ inline void send(SharedAddress to, int v0, int v1, int v2, int v3, SharedAddress barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "r"(v0), "r"(v1), "r"(v2), "r"(v3), "r"(barrier)
      : "memory");
}

__device__ inline void store_sums(SharedAddress to, float v0, float v1, float v2, float v3) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v0), "f"(v1), "f"(v2), "f"(v3) : "memory");
}
__device__ inline void store_sums(SharedAddress to, int v0, int v1, int v2, int v3) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v0), "r"(v1), "r"(v2), "r"(v3) : "memory");
}
__device__ inline void store_sums(uint4* to, float v0, float v1, float v2, float v3) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v0), "f"(v1), "f"(v2), "f"(v3) : "memory");
}
__device__ inline void store_sums(uint4* to, int v0, int v1, int v2, int v3) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v0), "r"(v1), "r"(v2), "r"(v3) : "memory");
}
__device__ inline void load_sums(SharedAddress from, float (&v)[4]) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(from)
               : "memory");
}
__device__ inline void load_sums(SharedAddress from, int (&v)[4]) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from)
               : "memory");
}

template <int kWords>
__device__ void load_words(SharedAddress from, uint32_t (&v)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 1) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v[0]) : "r"(from));
  } else if constexpr (kWords == 2) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(from));
  } else {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(from)
                 : "memory");
  }
}

__device__ inline float load_float(SharedAddress from) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
  return v;
}
__device__ inline void store_float(SharedAddress to, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}
__device__ inline void store_words(SharedAddress to, uint32_t first, uint32_t second) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second) : "memory");
}
__device__ inline void store_words(SharedAddress to, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// Some of the threads of a block wait for each other.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Without waiting.
__device__ inline void arrive_at_named_barrier(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <typename T>
constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_UINT8;
template <>
constexpr CUtensorMapDataType kMapType<float> = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
template <>
constexpr CUtensorMapDataType kMapType<bf16> = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
template <>
constexpr CUtensorMapDataType kMapType<fp16> = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

// A view for the copy engine in boxes with rows of 128 bytes, swizzled in shared memory, zero beyond the edges.
// Everything but the first axis must start on 16-byte boundaries; pitches are bytes.
template <typename T, int rank>
CUtensorMap box_map(const void* data, const cuuint64_t (&sizes)[rank], const cuuint64_t (&pitches)[rank - 1],
                    const cuuint32_t (&box)[rank]) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  cuuint32_t steps[rank];
  for (cuuint32_t& step : steps) step = 1;
  const CUresult result = encode(&map, kMapType<T>, rank, const_cast<void*>(data), sizes, pitches, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("bitkernels: the driver refused a tensor map");
  return map;
}

// Of a matrix [rows, columns], in boxes of 128 bytes times `box_rows`.
template <typename T>
CUtensorMap matrix_map(const void* matrix, int64_t rows, int64_t columns, int box_rows) {
  return box_map<T, 2>(matrix, {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                       {static_cast<cuuint64_t>(columns) * sizeof(T)},
                       {128 / sizeof(T), static_cast<cuuint32_t>(box_rows)});
}

// Of [batch, time, heads, columns] with strides in elements, in boxes of 128 bytes of one head times `tokens`.
template <typename T>
CUtensorMap tokens_map(const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3], int tokens) {
  // The driver refuses what an axis of length one may have as a stride, and never uses it.
  const auto pitch = [&](int axis) {
    return static_cast<cuuint64_t>(sizes[axis] > 1 ? strides[axis] * sizeof(T) : 16);
  };
  const auto size = [&](int axis) { return static_cast<cuuint64_t>(sizes[axis]); };
  return box_map<T, 4>(data, {size(3), size(2), size(1), size(0)}, {pitch(2), pitch(1), pitch(0)},
                       {128 / sizeof(T), 1, static_cast<cuuint32_t>(tokens), 1});
}

}  // namespace bitkernels::cuda
