// Every operator of the library, one schema each. Implementations are registered in csrc/<op>.cpp,
// or in bitkernels/<op>.py where an operator is made of others or runs on Triton.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bitkernels, m) {
  // The instruction set of the CPU kernels: portable, avx2 or avx512. `force` chooses one, "" the best again.
  m.def("cpu_path(str? force=None) -> str");

  m.def("pack_sign(Tensor w) -> Tensor");
  m.def("unpack_sign(Tensor w_packed, SymInt K, *, ScalarType dtype) -> Tensor");
  m.def("pack_ternary(Tensor w, Tensor? scale=None) -> Tensor");
  m.def("unpack_ternary(Tensor w_packed, SymInt K, *, ScalarType dtype) -> Tensor");

  m.def("packed_linear(Tensor x, Tensor w_packed, Tensor alpha, Tensor beta, Tensor? bias=None) -> Tensor");
  // Of a call with M tokens of like's dtype on its device; scales is column, row or single.
  m.def("explain_packed_linear(Tensor like, SymInt M, SymInt N, SymInt K, str scales) -> str");
  m.def(
      "packed_linear_backward(Tensor grad, Tensor x, Tensor w_packed, Tensor alpha, Tensor beta, "
      "bool scale_grads=True) -> "
      "(Tensor dx, Tensor dalpha, Tensor dbeta)");
  m.def(
      "sign_linear(Tensor x, Tensor weight, Tensor alpha, Tensor beta, Tensor? bias=None) -> "
      "(Tensor y, Tensor w_packed)");
  // An output that is not needed is an empty tensor.
  m.def(
      "sign_linear_weight_backward(Tensor product, Tensor w_packed, Tensor alpha, ScalarType weight_dtype, "
      "bool need_weight=True, bool need_scales=True) -> (Tensor dweight, Tensor dalpha, Tensor dbeta)");

  m.def("dense_linear(Tensor x, Tensor weight, Tensor? scale=None) -> Tensor");
  m.def("quantize_int8(Tensor x) -> (Tensor q, Tensor scale)");
  m.def("fake_quantize_int8(Tensor x) -> Tensor");
  m.def(
      "ternary_linear(Tensor x, Tensor w_packed, Tensor scale, Tensor? bias=None, int? act_bits=None) -> "
      "Tensor");
  m.def("explain_ternary_linear(Tensor like, SymInt M, SymInt N, SymInt K, int? act_bits=None) -> str");
  m.def("ternary_linear_backward(Tensor grad, Tensor w_packed, Tensor scale, SymInt K) -> Tensor dx");
  m.def(
      "ternary_linear_ste(Tensor x, Tensor weight, Tensor? bias=None, int? act_bits=8) -> "
      "(Tensor y, Tensor w_packed, Tensor scale)");
  m.def(
      "bit_embedding(Tensor ids, Tensor weight, Tensor norm_weight, Tensor norm_bias, float eps=1e-06) -> "
      "Tensor");

  m.def(
      "add_rms_norm(Tensor? residual, Tensor branch, Tensor weight, float eps, ScalarType dtype) -> "
      "(Tensor total, Tensor normed)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> Tensor");
  m.def(
      "add_rms_norm_backward(Tensor? dtotal, Tensor? dnormed, Tensor total, Tensor weight, float eps, "
      "ScalarType branch_dtype) -> (Tensor dresidual, Tensor dbranch, Tensor dweight)");

  m.def(
      "ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
      "Tensor? dt_bias=None, Tensor? initial_states=None, Tensor? seq_idx=None, Tensor? cu_seqlens=None, "
      "bool dt_softplus=False, float dt_min=0.0, float? dt_max=None, int chunk_size=64) -> "
      "(Tensor y, Tensor final_states)");
  // The same in Triton, for CUDA: what ssd_scan does there, but where the kernel for Hopper takes it.
  m.def(
      "ssd_scan_chunks(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
      "Tensor? dt_bias=None, Tensor? initial_states=None, Tensor? seq_idx=None, Tensor? cu_seqlens=None, "
      "bool dt_softplus=False, float dt_min=0.0, float? dt_max=None, int chunk_size=64) -> "
      "(Tensor y, Tensor final_states)");
  // That kernel, with thread blocks that share a sequence, what 64 tokens cost that only the state passes, in such with
  // outputs, and how many second parts a processor makes.
  m.def(
      "ssd_scan_hopper(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
      "Tensor? initial_states, bool dt_softplus, float dt_min, float? dt_max, int parts, float states_cost, "
      "int turns=1) -> (Tensor y, Tensor final_states)");
  // How ssd_scan asks it; no parts: it does not take the call.
  m.def(
      "ssd_scan_division(Tensor x, Tensor B, Tensor C, Tensor? z, Tensor? initial_states, Tensor? seq_idx, "
      "Tensor? cu_seqlens) -> (int parts, float states_cost, int turns)");
  // The gradient of an argument that was not given is an empty tensor.
  m.def(
      "ssd_scan_backward(Tensor dy, Tensor? dfinal_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, Tensor? initial_states=None, "
      "Tensor? seq_idx=None, Tensor? cu_seqlens=None, bool dt_softplus=False, float dt_min=0.0, "
      "float? dt_max=None, int chunk_size=64) -> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, "
      "Tensor dD, Tensor dz, Tensor ddt_bias, Tensor dinitial_states)");
  // What ssd_scan_backward does there: rows of the batch and tokens of them whose states are held at once, and thread
  // blocks over which the heads of a group are spread.
  m.def(
      "ssd_scan_backward_hopper(Tensor dy, Tensor? dfinal_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, bool dt_softplus, float dt_min, float? dt_max, "
      "int rows, int length, int splits) -> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor "
      "dz, "
      "Tensor ddt_bias, Tensor dinitial_states)");
  m.def(
      "ssd_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? z=None, Tensor? dt_bias=None, bool dt_softplus=False, float dt_min=0.0, float? dt_max=None, "
      "Tensor? state_indices=None, Tensor? seed=None, Tensor? position=None) -> Tensor");

  // The parts of a decode step of the Mamba-2 block before and after ssd_step; the first also without a convolution.
  m.def(
      "mamba2_in_step(Tensor residual, Tensor norm_weight, Tensor w_packed, Tensor alpha, Tensor beta, "
      "Tensor(a!)? conv_state, Tensor? conv_weight, Tensor? conv_bias, SymInt conv_start, ScalarType dtype, "
      "Tensor? bias=None, float eps=1e-05, Tensor? state_indices=None) -> Tensor");
  m.def(
      "mamba2_out_step(Tensor(a!) residual, Tensor y, Tensor norm_weight, Tensor w_packed, Tensor alpha, "
      "Tensor beta, Tensor? bias=None, float eps=1e-05) -> ()");
  // Many tokens through a layer.
  m.def(
      "mamba2_prompt(Tensor(a!) residual, Tensor in_norm, Tensor in_packed, Tensor in_alpha, Tensor in_beta, "
      "Tensor? in_bias, Tensor(b!) conv_state, Tensor conv_weight, Tensor? conv_bias, Tensor(c!) ssm_state, Tensor A, "
      "Tensor? D, Tensor dt_bias, Tensor out_norm, Tensor out_packed, Tensor out_alpha, Tensor out_beta, "
      "Tensor? out_bias, ScalarType dtype, float in_eps=1e-05, float out_eps=1e-05) -> ()");
  // One.
  m.def(
      "mamba2_step(Tensor(a!) residual, Tensor in_norm, Tensor in_packed, Tensor in_alpha, Tensor in_beta, "
      "Tensor? in_bias, Tensor(b!) conv_state, Tensor conv_weight, Tensor? conv_bias, Tensor(c!) ssm_state, Tensor A, "
      "Tensor? D, Tensor? dt_bias, Tensor out_norm, Tensor out_packed, Tensor out_alpha, Tensor out_beta, "
      "Tensor? out_bias, ScalarType dtype, float in_eps=1e-05, float out_eps=1e-05, Tensor? state_indices=None, "
      "Tensor? seed=None, Tensor? position=None) -> ()");
  // Every layer of a model; `parameters` are those of mamba2_step, layer by layer.
  m.def(
      "mamba2_stack_step(Tensor(a!) residual, Tensor?[] parameters, Tensor(b!) conv_state, Tensor(c!) ssm_state, "
      "ScalarType dtype, float in_eps=1e-05, float out_eps=1e-05, Tensor? state_indices=None) -> ()");
  // What mamba2_stack_step does on Hopper GPUs, and whether it could.
  m.def(
      "mamba2_stack_step_hopper(Tensor(a!) residual, Tensor?[] parameters, Tensor(b!) conv_state, "
      "Tensor(c!) ssm_state, ScalarType dtype, float in_eps, float out_eps, Tensor? state_indices) -> bool");
  m.def("head_step(Tensor residual, Tensor norm_weight, Tensor weight, float eps=1e-05) -> Tensor");
  // What head_step does there, and whether it could.
  m.def("head_step_hopper(Tensor residual, Tensor norm_weight, Tensor weight, Tensor(a!) logits, float eps) -> bool");

  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, "
      "Tensor? seq_idx=None, Tensor? cu_seqlens=None, bool silu=True) -> Tensor");
  m.def(
      "causal_conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias=None, "
      "Tensor? initial_state=None, Tensor? seq_idx=None, Tensor? cu_seqlens=None, bool silu=True) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "causal_conv1d_step(Tensor(a!) conv_state, Tensor x, Tensor weight, Tensor? bias=None, "
      "bool silu=True) -> Tensor");

  m.def("gated_rms_norm(Tensor x, Tensor z, Tensor weight, float eps=1e-05, SymInt? group_size=None) -> Tensor");
  m.def(
      "gated_rms_norm_backward(Tensor dy, Tensor x, Tensor z, Tensor weight, float eps=1e-05, "
      "SymInt? group_size=None) -> (Tensor dx, Tensor dz, Tensor dweight)");

  // Gradients are those of the sum over tokens, and empty tensors where they were not asked for.
  m.def(
      "distill_loss(Tensor hidden, Tensor head, Tensor? teacher_logits=None, Tensor? teacher_hidden=None, "
      "Tensor? teacher_head=None, Tensor? targets=None, str objective='cross_entropy', bool hidden_grad=False, "
      "bool head_grad=False) -> (Tensor loss, Tensor dhidden, Tensor dhead)");
  m.def(
      "mamba2_mixer(Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, Tensor A, Tensor? D, "
      "Tensor norm_weight, Tensor? initial_conv_state=None, Tensor? initial_states=None, Tensor? seq_idx=None, "
      "Tensor? cu_seqlens=None, int ngroups=1, int chunk_size=64, float dt_min=0.0, float? dt_max=None, float "
      "norm_eps=1e-05, "
      "SymInt? norm_group_size=None) -> (Tensor y, Tensor final_states)");
  m.def(
      "mamba2_mixer_backward(Tensor dy, Tensor? dfinal_states, Tensor zxbcdt, Tensor conv_weight, "
      "Tensor? conv_bias, Tensor dt_bias, Tensor A, Tensor? D, Tensor norm_weight, "
      "Tensor? initial_conv_state=None, Tensor? initial_states=None, Tensor? seq_idx=None, "
      "Tensor? cu_seqlens=None, int ngroups=1, int chunk_size=64, float dt_min=0.0, float? dt_max=None, float "
      "norm_eps=1e-05, "
      "SymInt? norm_group_size=None) -> (Tensor dzxbcdt, Tensor dconv_weight, Tensor dconv_bias, "
      "Tensor ddt_bias, Tensor dA, Tensor dD, Tensor dnorm_weight, Tensor dinitial_conv_state, "
      "Tensor dinitial_states)");
}
