// Of stack_tokens.cuh: the warp that moves states between memory and the ring in shared memory.
#pragma once

#include "hopper.cuh"
#include "stack_exchange.cuh"
#include "stack_tokens_layout.cuh"

namespace bitkernels::cuda {

// A round of states: an octet of all tokens.
struct StateRound {
  int layer = 0, octet = 0, at = 0, parity = 0;

  __device__ void next(int octets, int rounds) {
    if (++octet == octets) octet = 0, ++layer;
    if (++at == rounds) at = 0, parity ^= 1;
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline void load_state(SharedAddress to, const float* from, SharedAddress barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "n"(kStateUnitBytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ inline void store_state(float* to, SharedAddress from, uint64_t policy) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to), "r"(from),
               "n"(kStateUnitBytes), "l"(policy)
               : "memory");
}

// A token a lane: stores in order, and loads, two rounds at a time, into what has been stored.
__device__ inline void move_states(const StackTokensArgs& a, const StackLayer* layers, StackTokensShared& shared,
                                   uint8_t* states, const Share& inner, int lane) {
  const int tokens = a.tokens;
  const int total = a.count * inner.count, rounds = a.state_rounds;
  const bool has = lane < tokens, moves = has && shared.slot[lane] >= 0;
  const int64_t first = moves ? shared.slot[lane] * a.ssm_slot + int64_t(8 * inner.first) * kTokenState : 0;
  StateRound load, arriving, store;
  int loaded = 0, arrived = 0, stored = 0, free = rounds;
  const auto memory_of = [&](const StateRound& r) {
    return layers[r.layer].ssm_state + first + r.octet * (8 * kTokenState);
  };
  const auto held_of = [&](const StateRound& r) {
    return shared_address(states) + (r.at * tokens + lane) * kStateUnitBytes;
  };
  const auto passed = [&](const uint64_t* barriers, const StateRound& r) {
    return __all_sync(0xffffffff, !has || barrier_passed(shared_address(barriers + r.at * tokens + lane), r.parity));
  };
  const uint32_t moving = __ballot_sync(0xffffffff, moves);
  const int copy_cycles = kTurnCycles / tokens;
  const uint64_t policy = evict_first();
  uint32_t next = clock();
  const auto each_in_turn = [&](auto&& copy) {
#pragma unroll 1
    for (uint32_t left = moving; left; left &= left - 1) {
      while (static_cast<int>(clock() - next) < 0) {
      }
      next = clock() + copy_cycles;
      if (lane == __ffs(left) - 1) copy();
    }
    __syncwarp();
  };
  while (stored < total) {
    if (arrived < loaded && passed(shared.full, arriving)) {
      arriving.next(inner.count, rounds);
      ++arrived;
    }
    if (loaded < arrived + kLoadRounds && loaded < total && loaded < free) {
      const SharedAddress full = shared_address(&shared.full[load.at * tokens + lane]), held = held_of(load);
      const float* from = memory_of(load);
      if (has && !moves) barrier_arrive(full);
      each_in_turn([&] {
        barrier_arrive_expecting(full, kStateUnitBytes);
        load_state(held, from, full, policy);
      });
      load.next(inner.count, rounds);
      ++loaded;
    }
    if (stored < loaded && passed(shared.done, store)) {
      float* to = memory_of(store);
      const SharedAddress held = held_of(store);
      each_in_turn([&] { store_state(to, held, policy); });
      commit_stores();
      store.next(inner.count, rounds);
      ++stored;
      wait_for_stores_to_read<1>();
      free = rounds + stored - 1;
      __syncwarp();
    } else if (loaded >= free && free < rounds + stored) {
      wait_for_stores_to_read<0>();
      free = rounds + stored;
      __syncwarp();
    }
  }
  wait_for_stores_to_read<0>();
  __syncwarp();
}

#endif

}  // namespace bitkernels::cuda
