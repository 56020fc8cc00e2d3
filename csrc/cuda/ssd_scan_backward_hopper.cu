// The backward SSD scan on Hopper, in two kernels and one that adds parts: the states before every block of 64 tokens
// and the gradients of those after it, by walks through every head, and then all gradients of a block from them, all
// blocks at once, of a part of time where there are many. See docs/kernels/ssd_scan.md.
#include <algorithm>

#include "reduce.cuh"
#include "scan_gate.cuh"
#include "scan_gradient_groups.cuh"
#include "scan_gradient_pairs.cuh"
#include "ssd_scan_backward_hopper.h"

namespace bitkernels::cuda {

template <typename T, int N>
__global__ void __launch_bounds__(kGradientThreads, 1)
    scan_gradient_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap dy,
                         const __grid_constant__ CUtensorMap B, const __grid_constant__ CUtensorMap C,
                         const __grid_constant__ CUtensorMap h, const __grid_constant__ CUtensorMap dh,
                         const __grid_constant__ CUtensorMap dx, GradientProblem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint4 shared[];
  const GradientPlace<N> at(shared, p);
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < kGradientStages; ++i) {
      barrier_init(at.full + 8 * i, 1);
      barrier_init(at.empty + 8 * i, kGradientWarps + 1);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(at.summed + 8 * i, kGradientWarps);
      barrier_init(at.added + 8 * i, 1);
    }
    barrier_init(at.weighed, 4);
    barrier_init(at.applied, 4);
    barrier_init(at.ready, 1);
    barrier_init_fence();
  }
  {
    const int k = thread / 8, chunk = thread % 8;
    const auto one = [&](int i) { return 8 * chunk + i >= k ? 1.0f : 0.0f; };
    store_words(at.ones + in_box(k, chunk), pack_pair(bf16(), one(0), one(1)), pack_pair(bf16(), one(2), one(3)));
    store_words(at.ones + in_box(k, chunk) + 8, pack_pair(bf16(), one(4), one(5)), pack_pair(bf16(), one(6), one(7)));
    copy_engine_fence();
  }
  __syncthreads();
  const int group = uniform(thread / kScanWarpgroup);
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    const int warp = uniform(thread / 32);
    if (warp == 0 && thread == 0) {
      fetch_heads(at, p, x, dy, B, C, h, dh);
    } else if (warp == 1) {
      add_up(at, p, thread % 32);
    }
  } else if (group == 1) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 144;");
    pair_gradients<T, N>(at);
  } else if (group == 2) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 136;");
    enter_gradients<T, N>(at, p);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 176;");
    leave_gradients<T, N>(at, p, dx);
  }
#endif
}

struct PartSums {
  const float *head_sums, *lost, *skips, *dB_parts, *dC_parts;
  float *dA, *ddt_bias, *dD;
  void *dB, *dC;
  int64_t rows, lost_rows, H, splits, size;  // of head_sums, of lost, and of one part of dB or dC
};

// Sums in a fixed order: over blocks for heads (blockIdx.y = 0), a warp each, and over splits for dB and dC.
template <typename T>
__global__ void __launch_bounds__(256) sum_parts_kernel(PartSums p) {
  const int64_t thread = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (blockIdx.y == 0) {
    const int64_t head = thread / 32;
    const int lane = threadIdx.x % 32;
    if (head >= p.H) return;
    float sums[3] = {};
    for (int64_t r = lane; r < p.rows; r += 32) {
#pragma unroll
      for (int i = 0; i < 3; ++i) sums[i] += p.head_sums[(r * p.H + head) * 3 + i];
    }
    for (int64_t r = lane; r < p.lost_rows; r += 32) sums[0] += p.lost[r * p.H + head];
    if (p.skips) {
      sums[2] = 0.0f;
      for (int64_t r = lane; r < p.rows; r += 32) sums[2] += p.skips[r * p.H + head];
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) sums[i] = warp_reduce(sums[i], Sum());
    if (lane != 0) return;
    p.dA[head] = sums[0];
    if (p.ddt_bias) p.ddt_bias[head] = sums[1];
    if (p.dD) p.dD[head] = sums[2];
  } else if (4 * thread < p.size) {
    const float4* parts = reinterpret_cast<const float4*>(blockIdx.y == 1 ? p.dB_parts : p.dC_parts) + thread;
    float4 sum = parts[0];
    for (int64_t s = 1; s < p.splits; ++s) {
      const float4 v = parts[s * (p.size / 4)];
      sum.x += v.x;
      sum.y += v.y;
      sum.z += v.z;
      sum.w += v.w;
    }
    static_cast<uint2*>(blockIdx.y == 1 ? p.dB : p.dC)[thread] = {pack_pair(T(), sum.x, sum.y),
                                                                  pack_pair(T(), sum.z, sum.w)};
  }
}

// Where things are in the workspace. Time is taken in parts, so that a part's h and dh are all that is held of them.
struct Workspace {
  int64_t parts, part_blocks;
  uint16_t* of_y;              // [B, T, H, 64] in dtype: with a gate, the gradient of what it is applied to
  uint16_t *h, *dh;            // [rows, blocks of a part, H, 64, N] in dtype: before every block, and after it
  ScanRows* rows;              // [rows, blocks of a part, H]
  float* head_sums;            // of every part [B, blocks, H, 3]: parts of dA, ddt_bias and dD
  float* lost;                 // [parts, B, kLostRows, H] of dA
  float *dB_parts, *dC_parts;  // [splits, B, T, G, N], if there are several
  float* borders;              // [parts - 1, B, H, 64, N]: the states before all parts but the first
  float* dborder;              // [B, H, 64, N] the gradient of the states after a part, if there are several
  float* skips;                // [B, blocks, H] of dD, with a gate
  int64_t bytes;

  explicit Workspace(const HopperScanBackward& s) {
    parts = ceil_div(s.T, s.length);
    part_blocks = ceil_div(std::min(s.length, s.T), kScanTokens);
    const int64_t states = s.rows * part_blocks * s.H * kHeaddim * s.N;
    const int64_t sums = s.splits > 1 ? s.splits * s.batch * s.T * s.G * s.N : 0;
    const int64_t border = state_size(s);
    const int64_t blocks = ceil_div(s.T, kScanTokens);
    of_y = static_cast<uint16_t*>(s.workspace);
    h = of_y + (s.z.data ? s.batch * s.T * s.H * kHeaddim : 0);
    dh = h + states;
    dB_parts = reinterpret_cast<float*>(dh + states);
    dC_parts = dB_parts + sums;
    borders = dC_parts + sums;
    dborder = borders + (parts - 1) * border;
    rows = reinterpret_cast<ScanRows*>(dborder + (parts > 1 ? border : 0));
    head_sums = reinterpret_cast<float*>(rows + s.rows * part_blocks * s.H);
    lost = head_sums + s.batch * blocks * s.H * 3;
    skips = lost + parts * s.batch * kLostRows * s.H;
    bytes = (skips + (s.z.data ? s.batch * blocks * s.H : 0) - static_cast<float*>(s.workspace)) * sizeof(float);
  }

  static int64_t state_size(const HopperScanBackward& s) { return s.batch * s.H * kHeaddim * s.N; }
  float* border(const HopperScanBackward& s, int64_t part) const { return borders + (part - 1) * state_size(s); }
  const float* before(const HopperScanBackward& s, int64_t part) const {
    return part == 0 ? s.initial : border(s, part);
  }
};

int64_t ssd_scan_backward_hopper_workspace(const HopperScanBackward& s) { return Workspace(s).bytes; }

// The scan without its gate, of all tokens.
HopperScan forward(const HopperScanBackward& s) {
  return {.x = s.x,
          .B = s.B,
          .C = s.C,
          .z = {},
          .dt = s.dt,
          .A = s.A,
          .D = s.D,
          .dt_bias = s.dt_bias,
          .initial_states = s.initial,
          .y = nullptr,
          .final_states = nullptr,
          .dtype = s.dtype,
          .dt_dtype = s.dt_dtype,
          .D_head = 1,
          .D_channel = 0,
          .dt_softplus = s.dt_softplus,
          .dt_min = s.dt_min,
          .dt_max = s.dt_max,
          .batch = s.batch,
          .T = s.T,
          .H = s.H,
          .G = s.G,
          .N = s.N,
          .parts = 1,
          .turns = 1,
          .states_cost = 0.0};
}

// The state after a part, from the one before it.
void lead_states(const HopperScanBackward& s, const Workspace& work, int64_t part, cudaStream_t stream) {
  HopperScan states = forward(s);
  const auto begin_at = [&](ScanTensor& t, DType dtype) {
    t.data = static_cast<const char*>(t.data) + part * s.length * t.time * (dtype == DType::kFloat32 ? 4 : 2);
  };
  begin_at(states.x, s.dtype);
  begin_at(states.B, s.dtype);
  begin_at(states.C, s.dtype);
  begin_at(states.dt, s.dt_dtype);
  states.initial_states = work.before(s, part);
  states.final_states = work.border(s, part + 1);
  states.T = s.length;
  ssd_scan_hopper(states, stream);
}

// The gradient of the outputs without their gate.
template <typename T>
ScanTensor open_gate(const HopperScanBackward& s, const Workspace& work, cudaStream_t stream) {
  if (!s.z.data) return s.dy;
  HopperScan outputs = forward(s);
  outputs.y = s.dx;  // for now
  ssd_scan_hopper(outputs, stream);
  const GateProblem gate{.dy = s.dy,
                         .x = s.x,
                         .z = s.z,
                         .y = s.dx,
                         .of_y = work.of_y,
                         .dz = s.dz,
                         .dD = work.skips,
                         .T = static_cast<int>(s.T),
                         .H = static_cast<int>(s.H)};
  const Grid grid{.blocks = dim3(static_cast<unsigned>(ceil_div(s.T, kScanTokens)), static_cast<unsigned>(s.H),
                                 static_cast<unsigned>(s.batch)),
                  .threads = kGateThreads};
  launch(gate_kernel<T>, grid, stream, gate);
  return {work.of_y, s.T * s.H * kHeaddim, s.H * kHeaddim, kHeaddim};
}

template <typename T, int N>
void run_backward(const HopperScanBackward& s, cudaStream_t stream) {
  const Workspace work(s);
  const int64_t blocks = ceil_div(s.T, kScanTokens);
  const auto map = [&](const ScanTensor& t, int64_t heads, int64_t columns, int tokens = kScanTokens) {
    return tokens_map<T>(t.data, {s.batch, s.T, heads, columns}, {t.batch, t.time, t.head}, tokens);
  };
  const CUtensorMap x = map(s.x, s.H, kHeaddim), dy = map(open_gate<T>(s, work, stream), s.H, kHeaddim);
  const CUtensorMap B = map(s.B, s.G, N), C = map(s.C, s.G, N);
  const CUtensorMap dx = map({s.dx, s.T * s.H * kHeaddim, s.H * kHeaddim, kHeaddim}, s.H, kHeaddim, kScanTokens / 4);
  const int64_t state_rows = s.rows * work.part_blocks * s.H * kHeaddim;
  // Written by warps, sixteen rows each, read whole.
  const auto states = [&](const void* of, int rows) { return matrix_map<T>(of, state_rows, N, rows); };
  const CUtensorMap h_out = states(work.h, 16), dh_out = states(work.dh, 16);
  const CUtensorMap h_in = states(work.h, 64), dh_in = states(work.dh, 64);
  WalkProblem w{.dt = s.dt.data,
                .A = s.A,
                .dt_bias = s.dt_bias,
                .rows = work.rows,
                .dt_batch = s.dt.batch,
                .dt_time = s.dt.time,
                .dt_head = s.dt.head,
                .dt_min = s.dt_min,
                .dt_max = s.dt_max,
                .dt_dtype = s.dt_dtype,
                .dt_softplus = s.dt_softplus,
                .T = static_cast<int>(s.T),
                .H = static_cast<int>(s.H),
                .heads_per_group = static_cast<int>(s.H / s.G)};
  const bool shared = s.splits > 1;
  GradientProblem g{.rows = w.rows,
                    .A = s.A,
                    .D = s.D,
                    .ddt = s.ddt,
                    .dB = shared ? work.dB_parts : s.dB,
                    .dC = shared ? work.dC_parts : s.dC,
                    .dt_dtype = s.dt_dtype,
                    .parts = shared,
                    .batch = s.batch,
                    .T = w.T,
                    .H = w.H,
                    .G = static_cast<int>(s.G),
                    .splits = static_cast<int>(s.splits)};
  for (int64_t part = 0; part + 1 < work.parts; ++part) lead_states(s, work, part, stream);
  for (int64_t part = work.parts - 1; part >= 0; --part) {
    const int64_t first_block = part * work.part_blocks;
    w.first_block = g.first_block = static_cast<int>(first_block);
    w.blocks = g.blocks = static_cast<int>(std::min(work.part_blocks, blocks - first_block));
    w.initial = work.before(s, part);
    w.dfinal = part + 1 == work.parts ? s.dfinal : work.dborder;
    w.dinitial = part == 0 ? s.dinitial : work.dborder;
    w.lost = work.lost + part * s.batch * kLostRows * s.H;
    g.head_sums = work.head_sums + s.batch * first_block * s.H * 3;
    for (int64_t row = 0; row < s.batch; row += s.rows) {
      const int64_t rows = std::min(s.rows, s.batch - row);
      w.first_row = g.first_row = static_cast<int>(row);
      const Grid heads{.blocks = dim3(static_cast<unsigned>(rows * s.H), 2),
                       .threads = kWalkThreads,
                       .shared_bytes = WalkPlace<N>::kSharedBytes};
      launch(scan_walk_kernel<T, N>, heads, stream, x, B, dy, C, h_out, dh_out, w);
      const Grid tokens{.blocks = dim3(static_cast<unsigned>(rows * w.blocks), static_cast<unsigned>(s.splits),
                                       static_cast<unsigned>(s.G)),
                        .threads = kGradientThreads,
                        .shared_bytes = GradientPlace<N>::kSharedBytes};
      launch(scan_gradient_kernel<T, N>, tokens, stream, x, dy, B, C, h_in, dh_in, dx, g);
    }
  }
  const PartSums sums{.head_sums = work.head_sums,
                      .lost = work.lost,
                      .skips = s.z.data ? work.skips : nullptr,
                      .dB_parts = work.dB_parts,
                      .dC_parts = work.dC_parts,
                      .dA = s.dA,
                      .ddt_bias = s.ddt_bias,
                      .dD = s.dD,
                      .dB = s.dB,
                      .dC = s.dC,
                      .rows = s.batch * blocks,
                      .lost_rows = work.parts * s.batch * kLostRows,
                      .H = s.H,
                      .splits = s.splits,
                      .size = s.batch * s.T * s.G * N};
  const unsigned of_heads = static_cast<unsigned>(ceil_div(s.H, 8));
  const unsigned of_groups = shared ? static_cast<unsigned>(ceil_div(sums.size, 1024)) : 0;
  launch(sum_parts_kernel<T>, Grid{dim3(std::max(of_heads, of_groups), shared ? 3 : 1), 256}, stream, sums);
}

void ssd_scan_backward_hopper(const HopperScanBackward& s, Executor stream) {
  const auto with_state = [&]<typename T>(T) {
    s.N == 64 ? run_backward<T, 64>(s, stream) : run_backward<T, 128>(s, stream);
  };
  s.dtype == DType::kBFloat16 ? with_state(bf16()) : with_state(fp16());
}

}  // namespace bitkernels::cuda
