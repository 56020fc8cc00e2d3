// causal_conv1d, its backward and its step: checks, allocation, dispatch.
#include "mixer.h"

namespace bitkernels {
namespace {

// The kernel's description of the problem, and what keeps its pointers alive.
struct Convolution {
  std::vector<cpu::Sequence> sequences;
  Tensor x, weight;
  std::optional<Tensor> bias, initial, seq_idx;
  cpu::CausalConv1d args;

  Convolution(const char* op, const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
              const std::optional<Tensor>& initial_state, const std::optional<Tensor>& seq_idx_in,
              const std::optional<Tensor>& cu_seqlens, bool silu)
      : sequences(check(op, x_in, weight_in, bias_in, initial_state, seq_idx_in, cu_seqlens)),
        x(inner_dense(x_in)),
        weight(as_dtype(weight_in, scale_type(x_in.scalar_type()))),
        bias(as_dtype(bias_in, scale_type(x_in.scalar_type()))),
        initial(as_dtype(initial_state, x_in.scalar_type())),
        seq_idx(as_dtype(seq_idx_in, ScalarType::Long)),
        args{.x = strided(x),
             .weight = weight.const_data_ptr(),
             .bias = data_or_null(bias),
             .initial = data_or_null(initial),
             .seq_idx = static_cast<const int64_t*>(data_or_null(seq_idx)),
             .y = nullptr,
             .sequences = sequences.data(),
             .dtype = kernel_dtype(op, "x", x.scalar_type()),
             .silu = silu,
             .S = static_cast<int64_t>(sequences.size()),
             .T = x.size(1),
             .C = x.size(2),
             .W = weight.size(1)} {}

  static std::vector<cpu::Sequence> check(const char* op, const Tensor& x, const Tensor& weight,
                                          const std::optional<Tensor>& bias, const std::optional<Tensor>& initial_state,
                                          const std::optional<Tensor>& seq_idx,
                                          const std::optional<Tensor>& cu_seqlens) {
    kernel_dtype(op, "x", x.scalar_type());
    check_rank(op, "x", x, 3, "[B, T, C]");
    check_taps(op, x, weight, bias, x.size(2));
    std::vector<cpu::Sequence> out = bitkernels::sequences(op, x, cu_seqlens, cpu::causal_conv1d_chunks);
    if (initial_state) {
      check_same_device(op, "initial_state", *initial_state, x);
      check_floating(op, "initial_state", *initial_state);
      check_shape(op, "initial_state", *initial_state,
                  {static_cast<int64_t>(out.size()), weight.size(1) - 1, x.size(2)});
    }
    if (seq_idx) {
      check_same_device(op, "seq_idx", *seq_idx, x);
      check_integer(op, "seq_idx", *seq_idx);
      check_shape(op, "seq_idx", *seq_idx, {x.size(0), x.size(1)});
    }
    return out;
  }
};

Tensor causal_conv1d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& initial_state, const std::optional<Tensor>& seq_idx,
                     const std::optional<Tensor>& cu_seqlens, bool silu) {
  Convolution conv("causal_conv1d", x, weight, bias, initial_state, seq_idx, cu_seqlens, silu);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  conv.args.y = y.mutable_data_ptr();
  cpu::causal_conv1d(conv.args, Launch(x));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(const Tensor& dy, const Tensor& x,
                                                                  const Tensor& weight,
                                                                  const std::optional<Tensor>& bias,
                                                                  const std::optional<Tensor>& initial_state,
                                                                  const std::optional<Tensor>& seq_idx,
                                                                  const std::optional<Tensor>& cu_seqlens, bool silu) {
  constexpr const char* op = "causal_conv1d_backward";
  Convolution conv(op, x, weight, bias, initial_state, seq_idx, cu_seqlens, silu);
  check_same_device(op, "dy", dy, x);
  check_dtype(op, "dy", dy, x.scalar_type());
  check_shape(op, "dy", dy, {x.size(0), x.size(1), x.size(2)});
  const ScalarType acc = scale_type(x.scalar_type());
  const Tensor dy_dense = inner_dense(dy);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dweight = torch::stable::new_empty(weight, weight.sizes(), acc);
  Tensor dbias = bias ? torch::stable::new_empty(*bias, bias->sizes(), acc) : empty_gradient(x);
  Tensor dinitial = empty_gradient(x);
  if (initial_state) {
    dinitial = torch::stable::new_empty(x, initial_state->sizes());
    // Where a sequence is empty no token is there to send a gradient back.
    if (x.size(1) == 0 || cu_seqlens) torch::stable::zero_(dinitial);
  }
  cpu::CausalConv1dBackward args{.forward = conv.args,
                                 .dy = strided(dy_dense),
                                 .dx = dx.mutable_data_ptr(),
                                 .dweight = dweight.mutable_data_ptr(),
                                 .dbias = bias ? dbias.mutable_data_ptr() : nullptr,
                                 .dinitial = initial_state ? dinitial.mutable_data_ptr() : nullptr,
                                 .workspace = nullptr};
  const std::optional<Tensor> workspace = workspace_like(x, cpu::causal_conv1d_backward_workspace(args));
  args.workspace = mutable_data_or_null(workspace);
  cpu::causal_conv1d_backward(args, Launch(x));
  return {dx, dweight, dbias, dinitial};
}

Tensor causal_conv1d_step(Tensor conv_state, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          bool silu) {
  constexpr const char* op = "causal_conv1d_step";
  const DType dtype = kernel_dtype(op, "x", x.scalar_type());
  check_rank(op, "x", x, 2, "[B, C]");
  check_taps(op, x, weight, bias, x.size(1));
  check_same_device(op, "conv_state", conv_state, x);
  check_floating(op, "conv_state", conv_state);
  const int64_t batch = x.size(0), channels = x.size(1), history = weight.size(1) - 1;
  check_shape(op, "conv_state", conv_state, {batch, history, channels});
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (y.numel() == 0) return y;

  // A step is a convolution of one token; afterwards the window moves on by it.
  const ScalarType acc = scale_type(x.scalar_type());
  const Tensor xd = inner_dense(x), wd = as_dtype(weight, acc), window = as_dtype(conv_state, x.scalar_type());
  const std::optional<Tensor> bd = as_dtype(bias, acc);
  std::vector<cpu::Sequence> tokens;
  for (int64_t b = 0; b < batch; ++b) tokens.push_back({b, 0, 1, b});
  const cpu::CausalConv1d args{.x = strided_token(xd),
                               .weight = wd.const_data_ptr(),
                               .bias = data_or_null(bd),
                               .initial = window.const_data_ptr(),
                               .seq_idx = nullptr,
                               .y = y.mutable_data_ptr(),
                               .sequences = tokens.data(),
                               .dtype = dtype,
                               .silu = silu,
                               .S = batch,
                               .T = 1,
                               .C = channels,
                               .W = history + 1};
  cpu::causal_conv1d(args, Launch(x));
  for (int64_t t = 0; t < history; ++t) {
    Tensor to = torch::stable::select(conv_state, 1, t);
    torch::stable::copy_(to, t + 1 < history ? torch::stable::select(conv_state, 1, t + 1) : x);
  }
  return y;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&bitkernels::causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&bitkernels::causal_conv1d_backward));
  m.impl("causal_conv1d_step", TORCH_BOX(&bitkernels::causal_conv1d_step));
}
