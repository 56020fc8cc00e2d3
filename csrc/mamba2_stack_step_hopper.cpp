// mamba2_stack_step_hopper: whether the kernel can read the tensors as they are, and the call. What it does not take,
// bitkernels/mamba2_stack_step.py, which checked the shapes of what is no parameter, does layer by layer.
#include "cuda/mamba2_stack_step_hopper.h"

#include "mixer.h"

// Without code for sm_90a it would launch kernels that do nothing.
#ifdef BITKERNELS_SM90A

namespace bitkernels {
namespace {

constexpr const char* kOp = "mamba2_stack_step";

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

// Of one layer, whose tensors the kernel can read as they are; otherwise `usable` turns false.
class LayerReader {
 public:
  LayerReader(const std::optional<Tensor>* parameters, const Tensor& residual, bool& usable)
      : parameters_(parameters), residual_(residual), usable_(usable) {}

  const void* read(Parameter i, const char* name, ScalarType dtype, int64_t count, bool optional) {
    const std::optional<Tensor>& t = parameters_[i];
    if (!t) {
      check_argument(optional, kOp, ": ", name, " must be given");
      return nullptr;
    }
    check_same_device(kOp, name, *t, residual_);
    check_argument(t->numel() == count, kOp, ": ", name, " must have ", count, " elements, got ", shape(*t));
    usable_ = usable_ && t->scalar_type() == dtype && t->is_contiguous();
    return t->const_data_ptr();
  }
  const float* floats(Parameter i, const char* name, int64_t count, bool optional = false) {
    return static_cast<const float*>(read(i, name, ScalarType::Float, count, optional));
  }
  // The kernel knows scales of columns alone.
  const float* scale(Parameter i, const char* name, int64_t columns) {
    const std::optional<Tensor>& t = parameters_[i];
    usable_ = usable_ && t && t->dim() > 0 && t->size(-1) == columns;
    return usable_ ? floats(i, name, columns) : nullptr;
  }
  const uint32_t* packed(Parameter i, const char* name, int64_t count) {
    const void* data = read(i, name, ScalarType::UInt32, count, false);
    usable_ = usable_ && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    return static_cast<const uint32_t*>(data);
  }

 private:
  const std::optional<Tensor>* parameters_;
  const Tensor& residual_;
  bool& usable_;
};

// Whether the kernel took it.
bool mamba2_stack_step_hopper(Tensor residual, std::vector<std::optional<Tensor>> layers, Tensor conv_state,
                              Tensor ssm_state, ScalarType dtype, double in_eps, double out_eps,
                              const std::optional<Tensor>& state_indices) {
  const int64_t count = ssm_state.size(0), width = residual.size(1);
  if (residual.size(0) != 1 || count > cuda::kMostStackLayers || dtype != ScalarType::BFloat16) return false;
  for (const Tensor* t : {&residual, &conv_state, &ssm_state}) {
    if (t->scalar_type() != ScalarType::Float || t->size(-1) == 0 || t->stride(-1) != 1) return false;
  }
  const int64_t heads = ssm_state.size(2), head_dim = ssm_state.size(3), state = ssm_state.size(4);
  if (ssm_state.stride(3) != state || ssm_state.stride(2) != head_dim * state) return false;
  const int64_t taps = conv_state.size(2) + 1, channels = conv_state.size(3), inner = heads * head_dim;
  const int64_t groups = (channels - inner) / (2 * state), rows = inner + channels + heads;
  if (groups < 1 || inner + 2 * groups * state != channels) return false;
  const std::optional<Tensor> slots = dense_integers(state_indices);
  cuda::StackStep step{.residual = static_cast<float*>(residual.mutable_data_ptr()),
                       .state_indices = static_cast<const int64_t*>(data_or_null(slots)),
                       .slots = ssm_state.size(1),
                       .conv_slot = conv_state.stride(1),
                       .conv_row = conv_state.stride(2),
                       .ssm_slot = ssm_state.stride(1),
                       .count = count,
                       .width = width,
                       .heads = heads,
                       .head_dim = head_dim,
                       .state = state,
                       .groups = groups,
                       .taps = taps,
                       .in_eps = static_cast<float>(in_eps),
                       .out_eps = static_cast<float>(out_eps)};
  const Launch launch(residual);
  if (!cuda::stack_step_fits(step)) return false;
  bool usable = true;
  for (int64_t i = 0; i < count; ++i) {
    LayerReader of(layers.data() + i * kParameters, residual, usable);
    step.layers[i] = {
        .in_norm = of.floats(kInNorm, "in_norm", width),
        .in_alpha = of.scale(kInAlpha, "in_alpha", width),
        .in_beta = of.scale(kInBeta, "in_beta", width),
        .in_bias = of.floats(kInBias, "in_bias", rows, true),
        .conv_weight = of.floats(kConvWeight, "conv_weight", channels * taps),
        .conv_bias = of.floats(kConvBias, "conv_bias", channels, true),
        .A = of.floats(kA, "A", heads),
        .D = of.floats(kD, "D", heads, true),
        .dt_bias = of.floats(kDtBias, "dt_bias", heads, true),
        .out_norm = of.floats(kOutNorm, "out_norm", inner),
        .out_alpha = of.scale(kOutAlpha, "out_alpha", inner),
        .out_beta = of.scale(kOutBeta, "out_beta", inner),
        .out_bias = of.floats(kOutBias, "out_bias", width, true),
        .in_packed = of.packed(kInPacked, "in_packed", rows * (width / 32)),
        .out_packed = of.packed(kOutPacked, "out_packed", width * (inner / 32)),
        .conv_state = static_cast<float*>(conv_state.mutable_data_ptr()) + i * conv_state.stride(0),
        .ssm_state = static_cast<float*>(ssm_state.mutable_data_ptr()) + i * ssm_state.stride(0),
    };
    usable = usable && reinterpret_cast<uintptr_t>(step.layers[i].ssm_state) % 16 == 0;
  }
  if (!usable) return false;
  const std::optional<Tensor> workspace = workspace_like(residual, cuda::stack_step_workspace(step));
  step.workspace = mutable_data_or_null(workspace);
  cuda::stack_step(step, launch);
  return true;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CUDA, m) {
  m.impl("mamba2_stack_step_hopper", TORCH_BOX(&bitkernels::mamba2_stack_step_hopper));
}

#endif
