// The forward SSD scan on Hopper: a thread block walks through one head of one batch row, 64 tokens at a time, in a
// single pass. One warpgroup fetches, one leads the state, two make outputs of every other block: the recurrence
// waits for a product of 64 x 64 x N in every block and for nothing else. Where heads are few, thread blocks share a
// sequence: each leads the state from its beginning, and makes outputs of a part. See docs/kernels/ssd_scan.md.
#include <algorithm>
#include <cmath>

#include "scan_output.cuh"
#include "scan_produce.cuh"

namespace bitkernels::cuda {

template <typename T, int N, bool kGated>
__global__ void __launch_bounds__(kScanThreads, 1)
    ssd_scan_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap B,
                    const __grid_constant__ CUtensorMap C, const __grid_constant__ CUtensorMap z,
                    const __grid_constant__ CUtensorMap y, ScanProblem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint4 shared[];
  const ScanPlace<N> at(shared, p);
  const int group = uniform(threadIdx.x / kScanWarpgroup);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&x, &B, &C, &z, &y}) prefetch_map(map);
    for (int i = 0; i < kScanStages; ++i) {
      // By the thread that asks for copies, and by a warp that makes decays.
      barrier_init(at.full + 8 * i, 1 + 32);
      barrier_init(at.empty + 8 * i, 8);
    }
    for (int i = 0; i < kOutputGroups; ++i) {
      barrier_init(at.written + 8 * i, 4);
      barrier_init(at.read + 8 * i, 4);
    }
    for (int i = 0; i < kOutputGroups * kGateBoxes; ++i) barrier_init(at.gates + 8 * i, 1);
    for (int i = 0; i < kGateBoxes; ++i) barrier_init(at.left + 8 * i, 4);
    barrier_init_fence();
  }
  if (threadIdx.x < kHeaddim) {
    at.D[threadIdx.x] = p.D ? p.D[at.head * p.D_head + threadIdx.x * p.D_channel] : 0.0f;
  }
  __syncthreads();
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    const int warp = uniform(threadIdx.x / 32);
    const int lane = threadIdx.x % 32;
    if (warp < kDecayWarps) {
      produce_decays(at, p, warp, lane);
    } else if (warp == kDecayWarps && lane == 0) {
      produce_tiles(at, x, B, C);
    } else if (kGated && lane == 0) {
      produce_gates(at, z);
    }
  } else if (group == 1) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
    lead_state<T, N>(at, p);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 168;");
    make_outputs<T, N, kGated>(at, p, y, group - 2);
  }
#endif
}

// Every part has 1 - states_cost times the blocks of the part before: all take equally long, as
// states_cost * begin + (end - begin) then is the same for all. With `turns`, the second of two parts is of such a
// length that so many, one after the other on a processor that has no first part, take as long as a first part.
void divide(const HopperScan& s, ScanProblem& p) {
  if (!s.y) {
    p.begins[0] = p.begins[1] = p.blocks;
    return;
  }
  if (s.parts < 1 || s.parts > kMostScanParts || s.parts > p.blocks) {
    throw std::invalid_argument("ssd_scan_hopper: parts must be 1 to 4 and no more than the " +
                                std::to_string(p.blocks) + " blocks of 64 tokens, got " + std::to_string(s.parts));
  }
  if (s.turns < 1 || (s.turns > 1 && s.parts != 2)) {
    throw std::invalid_argument("ssd_scan_hopper: turns must be 1, or more with two parts, got " +
                                std::to_string(s.turns));
  }
  double share = 1.0, total = 0.0;
  const double ratio = 1.0 / s.turns - s.states_cost;
  for (int i = 0; i < s.parts; ++i, share *= ratio) total += share;
  double begin = 0.0;
  share = p.blocks / total;
  for (int i = 0; i < s.parts; ++i, share *= ratio) {
    p.begins[i] = std::clamp(static_cast<int>(std::lround(begin)), i > 0 ? p.begins[i - 1] + 1 : 0,
                             p.blocks - static_cast<int>(s.parts) + i);
    begin += share;
  }
  p.begins[s.parts] = p.blocks;
}

template <typename T, int N>
void run_scan(const HopperScan& s, cudaStream_t stream) {
  const auto map = [&](const ScanTensor& t, int64_t heads, int64_t columns, int tokens = kScanTokens) {
    return tokens_map<T>(t.data, {s.batch, s.T, heads, columns}, {t.batch, t.time, t.head}, tokens);
  };
  const ScanTensor y = s.y ? ScanTensor{s.y, s.T * s.H * kHeaddim, s.H * kHeaddim, kHeaddim} : s.x;
  ScanProblem p{.dt = s.dt.data,
                .A = s.A,
                .D = s.D,
                .dt_bias = s.dt_bias,
                .initial_states = s.initial_states,
                .final_states = s.final_states,
                .dt_batch = s.dt.batch,
                .dt_time = s.dt.time,
                .dt_head = s.dt.head,
                .D_head = s.D_head,
                .D_channel = s.D_channel,
                .dt_min = s.dt_min,
                .dt_max = s.dt_max,
                .dt_dtype = s.dt_dtype,
                .dt_softplus = s.dt_softplus,
                .T = static_cast<int>(s.T),
                .H = static_cast<int>(s.H),
                .heads_per_group = static_cast<int>(s.H / s.G),
                .blocks = static_cast<int>(ceil_div(s.T, kScanTokens))};
  divide(s, p);
  const bool gated = s.z.data;
  const Grid grid{.blocks = dim3(static_cast<unsigned>(s.batch * s.H), static_cast<unsigned>(s.parts)),
                  .threads = kScanThreads,
                  .shared_bytes = ScanPlace<N>::shared_bytes(gated)};
  launch(gated ? ssd_scan_kernel<T, N, true> : ssd_scan_kernel<T, N, false>, grid, stream, map(s.x, s.H, kHeaddim),
         map(s.B, s.G, N), map(s.C, s.G, N), map(gated ? s.z : s.x, s.H, kHeaddim),
         map(y, s.H, kHeaddim, kScanTokens / 4), p);
}

ScanDivision divide_scan(int64_t batch, int64_t T, int64_t H, bool gated) {
  if (!on_hopper()) return {};
  // Of the processors, heads of the whole batch: from there on it is faster than Triton's chunks, by half or more;
  // fewer were not measured (docs/kernels/ssd_scan.md).
  constexpr double kFewestHeads = 0.18;
  // Of 64 tokens that only the state passes, in such with outputs: of 0.2 to 0.6 the fastest at T = 8192.
  constexpr double kStatesCost = 0.4;
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount), heads = batch * H;
  if (heads < kFewestHeads * processors) return {};
  // As many parts as run at once and have outputs to make; more would make less outputs each than states before them.
  const int64_t blocks = ceil_div(T, kScanTokens);
  const int64_t parts = std::clamp<int64_t>(std::min(processors / heads, blocks), 1, kMostScanParts);
  // Two parts that do not all run at once, the second ones in turns by processors without a first one: pays for gated
  // outputs alone, as a state passes them at less of their cost.
  const int64_t idle = processors - heads;
  if (gated && parts == 1 && idle > 0 && blocks > 1) {
    const int64_t turns = ceil_div(heads, idle);
    if (turns > 1 && turns * kStatesCost < 1.0) return {2, kStatesCost, turns};
  }
  return {parts, kStatesCost, 1};
}

void ssd_scan_hopper(const HopperScan& s, Executor stream) {
  const auto with_state = [&]<typename T>(T) { s.N == 64 ? run_scan<T, 64>(s, stream) : run_scan<T, 128>(s, stream); };
  s.dtype == DType::kBFloat16 ? with_state(bf16()) : with_state(fp16());
}

}  // namespace bitkernels::cuda
