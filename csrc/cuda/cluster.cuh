// Blocks of a cluster, which write to each other's shared memory. Compute capability 9.0 on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitkernels::cuda {

// The same in all lanes, which the compiler cannot know: branches on it do not diverge.
__device__ inline int uniform(int v) { return __shfl_sync(0xffffffff, v, 0); }

__device__ inline int cluster_index() {
  int i;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(i));
  return i;
}
__device__ inline int rank_in_cluster() {
  int i;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(i));
  return i;
}
__device__ inline void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A barrier that opens once `bytes` have been sent to this block. Blocks learn of it by meeting at the cluster.
__device__ inline void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;\n"
      "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
          shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void wait_for_bytes(uint64_t* barrier) {
  asm volatile(
      "{\n.reg .pred open;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 open, [%0], 0;\n"
      "@!open bra wait;\n}" ::"r"(shared_address(barrier))
      : "memory");
}

// Stores to where `to`, an address of this block's shared memory, lies in block `rank` of a cluster of `parts` blocks.
template <int kCount>
__device__ void send(uint32_t* to, uint64_t* barrier, int rank, int parts, const uint32_t (&v)[kCount]) {
  if (parts == 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = v[i];
    return;
  }
  uint32_t address, remote_barrier;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(to)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(shared_address(barrier)), "r"(rank));
  if constexpr (kCount == 4) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(
            address),
        "r"(remote_barrier), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
        : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%2, %3}, [%1];" ::"r"(address),
        "r"(remote_barrier), "r"(v[0]), "r"(v[1])
        : "memory");
  } else {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %2, [%1];" ::"r"(address),
                 "r"(remote_barrier), "r"(v[0])
                 : "memory");
  }
}

}  // namespace bitkernels::cuda
