// The launch of stack_step.cuh: how the layers are shared out over the blocks, one to a processor.
#include <algorithm>

#include "launch.cuh"
#include "stack_step.cuh"

namespace bitkernels::cuda {
namespace {

struct StackPlan {
  StackArgs args;
  int blocks = 0;
  int64_t shared_bytes = 0;
  bool fits = false;
};

bool stack_shape_fits(const StackStep& s) {
  const int64_t inner = s.heads * s.head_dim;
  return s.count >= 1 && s.count <= kMostStackLayers && s.width > 0 && s.width % 128 == 0 &&
         s.width <= kMostStackWidth && inner > 0 && inner % 128 == 0 && inner <= kMostStackWidth &&
         s.head_dim % 8 == 0 && s.heads % s.groups == 0 && s.state % 4 == 0 && s.state > 0 && s.state <= 128 &&
         s.groups * s.state <= kMostStackWidth && s.taps >= 1 && s.taps <= kStackTaps && s.ssm_slot % 4 == 0;
}

StackPlan plan_stack(const StackStep& s) {
  StackPlan plan;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9 || !stack_shape_fits(s)) return plan;
  StackArgs& a = plan.args;
  a.count = static_cast<int>(s.count);
  a.width = static_cast<int>(s.width);
  a.heads = static_cast<int>(s.heads);
  a.head_dim = static_cast<int>(s.head_dim);
  a.inner = a.heads * a.head_dim;
  a.state = static_cast<int>(s.state);
  a.groups = static_cast<int>(s.groups);
  a.taps = static_cast<int>(s.taps);
  a.common_pitch = static_cast<int>(ceil_div(2 * a.groups * a.state + 2 * a.heads, 4) * 4);

  const int blocks = plan.blocks = device_attribute(cudaDevAttrMultiProcessorCount);
  const int inner = static_cast<int>(ceil_div(a.inner / 8, blocks));
  const int common = static_cast<int>(ceil_div(ceil_div(2 * a.groups * a.state + a.heads, 8), blocks));
  const int outer = static_cast<int>(ceil_div(a.width / 8, blocks));
  if (2 * inner + common > kStackWarps || outer > kStackWarps) return plan;
  a.in_rows = 8 * (2 * inner + common);  // an octet a warp
  a.out_rows = 8 * outer;
  a.block_groups = std::min(a.groups, (8 * inner - 8) / (a.inner / a.groups) + 2);

  // As in the kernel, and what its last tile of weights may read beyond its rows.
  const int64_t stage = a.in_rows * (a.width / 8) + a.in_rows / 2 * a.state * 4 + a.out_rows * (a.inner / 8);
  const int64_t params = (kInParams + kStepParams) * a.in_rows + kOutParams * a.out_rows;
  const int64_t floats = a.block_groups * 2 * a.state + ceil_div(a.width, kStackSlice) * a.in_rows +
                         ceil_div(a.inner, kStackSlice) * a.out_rows + a.in_rows + 2 * params;
  const int64_t rest = a.count * static_cast<int64_t>(sizeof(StackLayer)) + 8 * params + 4 * floats + 8 * (a.inner / 8);
  const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - int64_t(sizeof(StackShared)) - rest;
  const int64_t stages = room / stage < kMostStackStages ? room / stage : kMostStackStages;
  if (room < stage) return plan;
  a.stages = static_cast<int>(stages);
  plan.shared_bytes = stages * stage + rest;
  plan.fits = true;
  return plan;
}

int64_t exchanged_words(const StackArgs& a) {
  return int64_t(a.count) * (6 * (a.width / 8) + 6 * (a.inner / 8) + a.common_pitch);
}

}  // namespace

bool stack_step_fits(const StackStep& s) { return plan_stack(s).fits; }

int64_t stack_step_workspace(const StackStep& s) { return 4 * exchanged_words(plan_stack(s).args); }

void stack_step(const StackStep& s, Executor stream) {
  StackPlan plan = plan_stack(s);
  StackArgs& a = plan.args;
  const int64_t in_octets = a.count * (a.width / 8), out_octets = a.count * (a.inner / 8);
  a.residual = s.residual;
  a.in.values = static_cast<uint4*>(s.workspace);
  a.out.values = a.in.values + in_octets;
  a.in.sums = reinterpret_cast<float2*>(a.out.values + out_octets);
  a.out.sums = a.in.sums + in_octets;
  a.common = reinterpret_cast<float*>(a.out.sums + out_octets);
  a.state_indices = s.state_indices;
  a.slots = s.slots, a.conv_slot = s.conv_slot, a.conv_row = s.conv_row, a.ssm_slot = s.ssm_slot;
  a.per_width = 1.0f / static_cast<float>(a.width);
  a.per_inner = 1.0f / static_cast<float>(a.inner);
  a.in_eps = s.in_eps, a.out_eps = s.out_eps;
  for (int i = 0; i < a.count; ++i) a.layers[i] = s.layers[i];
  check(cudaMemsetAsync(s.workspace, 0xff, 4 * exchanged_words(a), stream));
  Grid grid{dim3(static_cast<unsigned>(plan.blocks)), kStackThreads, static_cast<size_t>(plan.shared_bytes)};
  grid.together = true;
  launch(stack_step_kernel, grid, stream, a);
}

}  // namespace bitkernels::cuda
