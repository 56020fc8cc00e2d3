// Of stack_tokens.cuh: sizes, arguments, and what lies where.
#pragma once

#include "mamba2_stack_step_hopper.h"

namespace bitkernels::cuda {

constexpr int kStackTokens = 8;
constexpr int kTokenWarps = 16;  // that compute; one more copies, and the rest fetch
constexpr int kFetchWarps = 2;
constexpr int kTokenWorkers = 32 * kTokenWarps;
constexpr int kTokenThreads = kTokenWorkers + 32 + 32 * kFetchWarps;
constexpr int kTokenState = 128;  // elements of a row
constexpr int kTokenTaps = 4;
constexpr int kUnitK = 128;                              // of K: a word of weights in each lane of a quad
constexpr int kInUnits = 2, kOutUnits = 2;               // of a warp, at most
constexpr int kMostInnerOctets = 8, kMostOutOctets = 4;  // of a block
constexpr int kStateUnitBytes = 8 * kTokenState * 4;
constexpr int kMostStateUnits = 64;
constexpr int kLoadRounds = 2;     // of states, on their way at once
constexpr int kTurnCycles = 1200;  // in which a copy of each token's states begins: of few tokens 1 to 2 % faster
static_assert(kTokenWarps == 2 * kStackTokens, "two warps share an octet of a token");

struct StackTokensArgs {
  float* residual;    // [tokens, width]
  uint8_t* exchange;  // [layer][layer_bytes], see below
  int layer_bytes, out_at, common_at, steps_at, in_sums_at, out_sums_at;
  const int64_t* state_indices;
  int64_t slots, conv_slot, conv_row, ssm_slot;  // strides
  int count, tokens;                             // count: of layers
  int width, inner, heads, head_dim;
  int in_octets, inner_octets, out_octets;  // of a block, at most
  int slices, groups;                       // of the input projection: warps that share K, and rows
  int state_rounds;                         // that shared memory holds
  float per_width, per_inner;               // 1 / width, 1 / inner
  float in_eps, out_eps;
  StackLayer layers[kMostStackLayers];
};

// Of a layer's exchange: activations of both projections in order of fragments, 16 bytes an octet; B and C as bf16
// [token][2 N], step and decay [token][head]; sums of squares and of shifted activations [block][token], twice.

// Where octet `octet` of K of token `token` lies, in vectors of 16 bytes.
__device__ inline int fragment_of(int octet, int token) {
  return ((octet / 16 * 4 + octet % 4) * kStackTokens + token) * 4 + octet % 16 / 4;
}

struct StackTokensShared {
  uint64_t full[kMostStateUnits], done[kMostStateUnits];  // of units of states
  uint64_t sent[2], totals[2];                            // of the projections: sums are here; norms are known
  int64_t slot[kStackTokens];
  int in_row[2 * kTokenWarps], out_row[2 * kMostOutOctets];  // of the cluster's octets, the first; negative for none
  int head[kTokenWarps];                                     // of the block's octets of channels, from its first
  float2 total[2][kFetchWarps][kStackTokens];                // of squares and shifted, what each warp has added up
  float2 out_sums[kMostOutOctets][kStackTokens];             // the residual's, of squares and shifted
  float2 state_sums[kTokenWarps];                            // the outputs'
};

}  // namespace bitkernels::cuda
