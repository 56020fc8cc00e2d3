"""A step of the Mamba-2 block and its ends, made of other operators, where the CUDA library was not built."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mamba2_in_step(
    residual: Tensor,
    norm_weight: Tensor,
    w_packed: Tensor,
    alpha: Tensor,
    beta: Tensor,
    conv_state: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_start: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    state_indices: Tensor | None = None,
) -> Tensor:
    """``bitkernels::mamba2_in_step``."""
    normalised = F.rms_norm(residual, residual.shape[-1:], norm_weight.to(residual.dtype), eps).to(dtype)
    y = torch.ops.bitkernels.packed_linear(normalised, w_packed, alpha, beta, bias)
    if conv_state is None:
        return y
    inputs = y[:, conv_start : conv_start + conv_weight.shape[0]]
    state = conv_state
    if state_indices is not None:
        slots = state_indices.long()
        held = ((slots >= 0) & (slots < conv_state.shape[0]))[:, None, None]
        state = torch.where(held, conv_state[slots.clamp(0, conv_state.shape[0] - 1)], 0)
    outputs = torch.ops.bitkernels.causal_conv1d_step(state, inputs, conv_weight, conv_bias)
    if state_indices is not None:
        # Padding writes to a slot of its own past the end, so that no two requests write one.
        padded = torch.cat([conv_state, state.new_empty(1, *state.shape[1:])])
        conv_state.copy_(padded.index_copy_(0, torch.where(held[:, 0, 0], slots, conv_state.shape[0]), state)[:-1])
    inputs.copy_(outputs)
    return y


def mamba2_out_step(
    residual: Tensor,
    y: Tensor,
    norm_weight: Tensor,
    w_packed: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """``bitkernels::mamba2_out_step``."""
    normalised = F.rms_norm(y.float(), y.shape[-1:], norm_weight.float(), eps).to(y.dtype)
    residual += torch.ops.bitkernels.packed_linear(normalised, w_packed, alpha, beta, bias)


def mamba2_step(
    residual: Tensor,
    in_norm: Tensor,
    in_packed: Tensor,
    in_alpha: Tensor,
    in_beta: Tensor,
    in_bias: Tensor | None,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ssm_state: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    out_norm: Tensor,
    out_packed: Tensor,
    out_alpha: Tensor,
    out_beta: Tensor,
    out_bias: Tensor | None,
    dtype: torch.dtype,
    in_eps: float = 1e-5,
    out_eps: float = 1e-5,
    state_indices: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
) -> None:
    """``bitkernels::mamba2_step``."""
    ops = torch.ops.bitkernels
    H, P, N = ssm_state.shape[1:]
    state_columns = (conv_weight.shape[0] - H * P) // 2
    projected = ops.mamba2_in_step(
        residual, in_norm, in_packed, in_alpha, in_beta, conv_state, conv_weight, conv_bias, H * P, dtype, in_bias,
        in_eps, state_indices,
    )  # fmt: skip
    z, x, B, C, dt = projected.split([H * P, H * P, state_columns, state_columns, H], dim=-1)
    heads, groups = (H, P), (state_columns // N, N)
    y = ops.ssd_step(
        ssm_state, x.unflatten(-1, heads), dt, A, B.unflatten(-1, groups), C.unflatten(-1, groups), D,
        z.unflatten(-1, heads), dt_bias, True, 0.0, None, state_indices, seed, position,
    )  # fmt: skip
    ops.mamba2_out_step(residual, y.flatten(-2), out_norm, out_packed, out_alpha, out_beta, out_bias, out_eps)
