// What a few tokens need of clusters: to know one's place, and to send sums from block to block.
#pragma once

#include "hopper.cuh"

namespace bitkernels::cuda {

__device__ inline int cluster_index() {
  int i;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(i));
  return i;
}

// The two halves of wait_for_cluster().
__device__ inline void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void wait_for_arrivals() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Stores to where `to`, an address of this block's shared memory, lies in block `rank` of a cluster of `parts` blocks,
// whose `barrier` counts the bytes.
template <int kCount>
__device__ void send(uint32_t* to, const uint64_t* barrier, int rank, int parts, const uint32_t (&v)[kCount]) {
  if (parts == 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = v[i];
    return;
  }
  const SharedAddress there = in_block(shared_address(to), rank);
  const SharedAddress barrier_there = in_block(shared_address(barrier), rank);
  if constexpr (kCount == 4) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(there),
        "r"(barrier_there), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
        : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%2, %3}, [%1];" ::"r"(there),
                 "r"(barrier_there), "r"(v[0]), "r"(v[1])
                 : "memory");
  } else {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %2, [%1];" ::"r"(there),
                 "r"(barrier_there), "r"(v[0])
                 : "memory");
  }
}

}  // namespace bitkernels::cuda
