"""The steps on either side of ``ssd_step``, made of other operators, where the CUDA library was not built."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels.triton import arguments


def mamba2_in_step(
    residual: Tensor,
    norm_weight: Tensor,
    w_packed: Tensor,
    alpha: Tensor,
    beta: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
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


def register(dispatch_key: str = "CUDA") -> None:
    arguments.register(dispatch_key, mamba2_in_step, mamba2_out_step)
