// The launch of stack_tokens.cuh: how the layers are shared out over the blocks, one to a processor, two to a cluster.
#include <algorithm>

#include "launch.cuh"
#include "stack_tokens.cuh"

namespace bitkernels::cuda {
namespace {

struct TokensPlan {
  StackTokensArgs args = {};
  int blocks = 0, in_tiles = 0;  // in_tiles: of a warp
  int64_t shared_bytes = 0;
  bool fits = false;
};

constexpr int kMostInTiles = 4, kMostOutTiles = 3;

bool tokens_shape_fits(const StackStep& s) {
  const int64_t inner = s.heads * s.head_dim, step = 2 * kUnitK, most = step * kTokenWarps;
  return s.count >= 1 && s.count <= kMostStackLayers && s.tokens >= 2 && s.tokens <= kStackTokens && s.width > 0 &&
         s.width % step == 0 && s.width <= most && inner > 0 && inner % step == 0 && inner <= kOutUnits * most &&
         s.head_dim % 8 == 0 && s.heads % 8 == 0 && s.state == kTokenState && s.groups == 1 && s.taps == kTokenTaps &&
         s.ssm_slot % 4 == 0;
}

TokensPlan plan_tokens(const StackStep& s) {
  TokensPlan plan;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9 || !tokens_shape_fits(s)) return plan;
  StackTokensArgs& a = plan.args;
  a.count = static_cast<int>(s.count);
  a.tokens = static_cast<int>(s.tokens);
  a.width = static_cast<int>(s.width);
  a.heads = static_cast<int>(s.heads);
  a.head_dim = static_cast<int>(s.head_dim);
  a.inner = a.heads * a.head_dim;

  const int blocks = plan.blocks = device_attribute(cudaDevAttrMultiProcessorCount) / 2 * 2;
  const auto most_of = [&](int octets) { return static_cast<int>(ceil_div(octets, blocks)); };
  a.inner_octets = most_of(a.inner / 8);
  a.in_octets = 2 * a.inner_octets + most_of((2 * kTokenState + a.heads) / 8);
  a.out_octets = most_of(a.width / 8);
  a.slices = static_cast<int>(ceil_div(a.width / (2 * kUnitK), kInUnits));
  a.groups = kTokenWarps / a.slices;
  plan.in_tiles = static_cast<int>(ceil_div(a.in_octets, a.groups));
  if (a.in_octets > kTokenWarps || a.inner_octets > kMostInnerOctets || plan.in_tiles > kMostInTiles ||
      a.out_octets > kMostOutTiles)
    return plan;

  // A layer's exchange, as in the kernel.
  auto place = [at = 0](int bytes) mutable {
    const int from = at;
    at += static_cast<int>(ceil_div(bytes, 128) * 128);
    return from;
  };
  place(a.width * kStackTokens * 2);
  a.out_at = place(a.inner * kStackTokens * 2);
  a.common_at = place(kStackTokens * 2 * kTokenState * 2);
  a.steps_at = place(kStackTokens * a.heads * 8);
  a.in_sums_at = place(blocks * kStackTokens * 8);
  a.out_sums_at = place(blocks * kStackTokens * 8);
  a.layer_bytes = place(0);

  const int sources = std::min(kTokenWarps, a.inner / (2 * kUnitK));
  const int64_t sums = std::max(a.slices * a.in_octets, sources * a.out_octets) * 2 * 8 * kStackTokens;
  const int64_t channels = 8 * a.inner_octets;
  const int64_t received = (a.in_octets + a.out_octets) * 8 * kStackTokens;
  const int64_t rest = a.width / (2 * kUnitK) * kUnitK * 16 +
                       4 * (sums + received + 2 * channels * kStackTokens + 4 * channels) +
                       a.count * int64_t(sizeof(StackLayer));
  constexpr int64_t kSpare = 256;
  const int64_t room =
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - int64_t(sizeof(StackTokensShared)) - kSpare - rest;
  const int64_t round = a.tokens * kStateUnitBytes;
  a.state_rounds =
      static_cast<int>(std::min<int64_t>({room / round, 2 * a.inner_octets, kMostStateUnits / kStackTokens}));
  if (room < 0 || a.state_rounds < std::min(a.inner_octets, 2)) return plan;
  plan.shared_bytes = a.state_rounds * round + rest;
  plan.fits = true;
  return plan;
}

}  // namespace

bool stack_tokens_fit(const StackStep& s) { return plan_tokens(s).fits; }

int64_t stack_tokens_workspace(const StackStep& s) { return s.count * plan_tokens(s).args.layer_bytes; }

void stack_tokens(const StackStep& s, Executor stream) {
  TokensPlan plan = plan_tokens(s);
  StackTokensArgs& a = plan.args;
  a.residual = s.residual;
  a.exchange = static_cast<uint8_t*>(s.workspace);
  a.state_indices = s.state_indices;
  a.slots = s.slots, a.conv_slot = s.conv_slot, a.conv_row = s.conv_row, a.ssm_slot = s.ssm_slot;
  a.per_width = 1.0f / static_cast<float>(a.width);
  a.per_inner = 1.0f / static_cast<float>(a.inner);
  a.in_eps = s.in_eps, a.out_eps = s.out_eps;
  for (int i = 0; i < a.count; ++i) a.layers[i] = s.layers[i];
  check(cudaMemsetAsync(s.workspace, 0xff, int64_t(a.count) * a.layer_bytes, stream));
  Grid grid{dim3(static_cast<unsigned>(plan.blocks)), kTokenThreads, static_cast<size_t>(plan.shared_bytes)};
  grid.together = true;
  grid.cluster = 2;
  if (plan.in_tiles <= 2 && a.out_octets <= 2) {
    launch(stack_tokens_kernel<2, 2>, grid, stream, a);
  } else if (plan.in_tiles <= 3 && a.out_octets <= 2) {
    launch(stack_tokens_kernel<3, 2>, grid, stream, a);
  } else {
    launch(stack_tokens_kernel<kMostInTiles, kMostOutTiles>, grid, stream, a);
  }
}

}  // namespace bitkernels::cuda
