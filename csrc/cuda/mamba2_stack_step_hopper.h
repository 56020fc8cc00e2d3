// One to eight tokens through all layers in one kernel, for Hopper. What it does not take, the layers' own steps do
// (bitkernels/mamba2_stack_step.py).
#pragma once

#include "kernels.h"

namespace bitkernels::cuda {

constexpr int kMostStackLayers = 96;

struct StackLayer {
  const float *in_norm, *in_alpha, *in_beta, *in_bias;      // [width] thrice, [rows] or null
  const float *conv_weight, *conv_bias;                     // [channels, taps], [channels] or null
  const float *A, *D, *dt_bias;                             // [heads]; the last two or null
  const float *out_norm, *out_alpha, *out_beta, *out_bias;  // [inner] thrice, [width] or null
  const uint32_t *in_packed, *out_packed;                   // [rows, width / 32], [width, inner / 32]
  float *conv_state, *ssm_state;                            // [slots, taps - 1, channels], [slots, heads, P, N]
};

// Rows of the input projection are z, x, B, C and dt.
struct StackStep {
  StackLayer layers[kMostStackLayers];
  float* residual;               // [tokens, width]
  const int64_t* state_indices;  // [tokens] or null: the first slots
  void* workspace;               // stack_step_workspace() bytes
  // Strides in elements; the innermost is 1, and so is all within a slot of ssm_state.
  int64_t slots, conv_slot, conv_row, ssm_slot;
  int64_t count, tokens, width, heads, head_dim, state, groups, taps;
  float in_eps, out_eps;
};
// Whether the current device's kernel takes it; pointers may still be null.
bool stack_step_fits(const StackStep&);
int64_t stack_step_workspace(const StackStep&);
void stack_step(const StackStep&, Executor);

// Of two to eight tokens.
bool stack_tokens_fit(const StackStep&);
int64_t stack_tokens_workspace(const StackStep&);
void stack_tokens(const StackStep&, Executor);

}  // namespace bitkernels::cuda
