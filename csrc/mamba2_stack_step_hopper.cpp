// mamba2_stack_step_hopper: whether the kernel can read the tensors as they are, and the call. What it cannot take, and
// what does not fit together, bitkernels/mamba2_stack_step.py takes layer by layer, and those steps tell what is wrong.
#include "cuda/mamba2_stack_step_hopper.h"

#include <algorithm>

#include "mixer.h"

// Without code for sm_90a it would launch kernels that do nothing.
#ifdef BITKERNELS_SM90A

namespace bitkernels {
namespace {

// What a layer's parameters are, in the order of mamba2_step's arguments.
enum Parameter {
  kInNorm,
  kInPacked,
  kInAlpha,
  kInBeta,
  kInBias,
  kConvWeight,
  kConvBias,
  kA,
  kD,
  kDtBias,
  kOutNorm,
  kOutPacked,
  kOutAlpha,
  kOutBeta,
  kOutBias,
  kParameters
};

// Reads the parameters of a layer; one that the kernel cannot read as it is turns `usable` false.
class LayerReader {
 public:
  LayerReader(const std::optional<Tensor>* parameters, const Tensor& residual, bool& usable)
      : parameters_(parameters), residual_(residual), usable_(usable) {}

  const float* floats(Parameter i, std::initializer_list<int64_t> expected) {
    return static_cast<const float*>(read(i, ScalarType::Float, shape_is(i, expected)));
  }
  const float* floats_or_null(Parameter i, std::initializer_list<int64_t> expected) {
    return parameters_[i] ? floats(i, expected) : nullptr;
  }
  // The kernel knows scales of columns alone.
  const float* scale(Parameter i, int64_t columns) {
    return static_cast<const float*>(read(i, ScalarType::Float, shape_is(i, {columns}) || shape_is(i, {1, columns})));
  }
  const uint32_t* packed(Parameter i, std::initializer_list<int64_t> expected) {
    const void* data = read(i, ScalarType::UInt32, shape_is(i, expected));
    usable_ = usable_ && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    return static_cast<const uint32_t*>(data);
  }

 private:
  bool shape_is(Parameter i, std::initializer_list<int64_t> expected) const {
    return parameters_[i] && shape(*parameters_[i]) == Shape{expected};
  }
  const void* read(Parameter i, ScalarType dtype, bool fits) {
    const std::optional<Tensor>& t = parameters_[i];
    usable_ = usable_ && fits && t->scalar_type() == dtype && t->is_contiguous() && same_device(*t, residual_);
    return usable_ ? t->const_data_ptr() : nullptr;
  }

  const std::optional<Tensor>* parameters_;
  const Tensor& residual_;
  bool& usable_;
};

// Whether the kernel took it.
bool mamba2_stack_step_hopper(Tensor residual, std::vector<std::optional<Tensor>> layers, Tensor conv_state,
                              Tensor ssm_state, ScalarType dtype, double in_eps, double out_eps,
                              const std::optional<Tensor>& state_indices) {
  const int64_t count = ssm_state.size(0), tokens = residual.size(0), width = residual.size(1);
  if (tokens < 1 || count > cuda::kMostStackLayers || dtype != ScalarType::BFloat16) return false;
  if (static_cast<int64_t>(layers.size()) != count * kParameters) return false;
  if (tokens > 1 && residual.stride(0) != width) return false;
  // Without indices each token has its own state of each kind, and with them the pools may have spare ones.
  const int64_t slots = std::min(conv_state.size(1), ssm_state.size(1));
  if (state_indices) {
    check_slots("mamba2_stack_step", "ssm_state", *state_indices, tokens, slots, residual);
  } else if (conv_state.size(1) != tokens || ssm_state.size(1) != tokens) {
    return false;
  }
  for (const Tensor* t : {&residual, &conv_state, &ssm_state}) {
    if (t->scalar_type() != ScalarType::Float || t->size(-1) == 0 || t->stride(-1) != 1) return false;
  }
  const int64_t heads = ssm_state.size(2), head_dim = ssm_state.size(3), state = ssm_state.size(4);
  if (ssm_state.stride(3) != state || ssm_state.stride(2) != head_dim * state) return false;
  const int64_t taps = conv_state.size(2) + 1, channels = conv_state.size(3), inner = heads * head_dim;
  const int64_t groups = (channels - inner) / (2 * state), rows = inner + channels + heads;
  if (groups < 1 || inner + 2 * groups * state != channels) return false;
  const std::optional<Tensor> indices = dense_integers(state_indices);
  cuda::StackStep step{.residual = static_cast<float*>(residual.mutable_data_ptr()),
                       .state_indices = static_cast<const int64_t*>(data_or_null(indices)),
                       .slots = slots,
                       .conv_slot = conv_state.stride(1),
                       .conv_row = conv_state.stride(2),
                       .ssm_slot = ssm_state.stride(1),
                       .count = count,
                       .tokens = tokens,
                       .width = width,
                       .heads = heads,
                       .head_dim = head_dim,
                       .state = state,
                       .groups = groups,
                       .taps = taps,
                       .in_eps = static_cast<float>(in_eps),
                       .out_eps = static_cast<float>(out_eps)};
  const Launch launch(residual);
  if (!(tokens == 1 ? cuda::stack_step_fits(step) : cuda::stack_tokens_fit(step))) return false;
  bool usable = true;
  for (int64_t i = 0; i < count; ++i) {
    LayerReader of(layers.data() + i * kParameters, residual, usable);
    step.layers[i] = {
        .in_norm = of.floats(kInNorm, {width}),
        .in_alpha = of.scale(kInAlpha, width),
        .in_beta = of.scale(kInBeta, width),
        .in_bias = of.floats_or_null(kInBias, {rows}),
        .conv_weight = of.floats(kConvWeight, {channels, taps}),
        .conv_bias = of.floats_or_null(kConvBias, {channels}),
        .A = of.floats(kA, {heads}),
        .D = of.floats_or_null(kD, {heads}),
        .dt_bias = of.floats_or_null(kDtBias, {heads}),
        .out_norm = of.floats(kOutNorm, {inner}),
        .out_alpha = of.scale(kOutAlpha, inner),
        .out_beta = of.scale(kOutBeta, inner),
        .out_bias = of.floats_or_null(kOutBias, {width}),
        .in_packed = of.packed(kInPacked, {rows, width / 32}),
        .out_packed = of.packed(kOutPacked, {width, inner / 32}),
        .conv_state = static_cast<float*>(conv_state.mutable_data_ptr()) + i * conv_state.stride(0),
        .ssm_state = static_cast<float*>(ssm_state.mutable_data_ptr()) + i * ssm_state.stride(0),
    };
    usable = usable && reinterpret_cast<uintptr_t>(step.layers[i].ssm_state) % 16 == 0;
    usable = usable && (tokens == 1 || reinterpret_cast<uintptr_t>(step.layers[i].conv_weight) % 16 == 0);
  }
  if (!usable) return false;
  const std::optional<Tensor> workspace =
      workspace_like(residual, tokens == 1 ? cuda::stack_step_workspace(step) : cuda::stack_tokens_workspace(step));
  step.workspace = mutable_data_or_null(workspace);
  tokens == 1 ? cuda::stack_step(step, launch) : cuda::stack_tokens(step, launch);
  return true;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CUDA, m) {
  m.impl("mamba2_stack_step_hopper", TORCH_BOX(&bitkernels::mamba2_stack_step_hopper));
}

#endif
