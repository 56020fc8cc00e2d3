"""``mamba2_prompt``: many tokens through a layer of a Mamba-2 model, into its states."""

import torch
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)
from bitkernels.mamba2_mixer import gated_mixer


def mamba2_prompt(
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
    dt_bias: Tensor,
    out_norm: Tensor,
    out_packed: Tensor,
    out_alpha: Tensor,
    out_beta: Tensor,
    out_bias: Tensor | None,
    dtype: torch.dtype,
    in_eps: float = 1e-5,
    out_eps: float = 1e-5,
) -> None:
    """What :func:`mamba2_step` does for one token, for T tokens of B sequences, one after the other in each.

    :func:`mamba2_in_step` without its convolution, :func:`causal_conv1d`, :func:`ssd_scan` with the gate,
    :func:`mamba2_out_step`. On Hopper GPUs all their kernels are launched by one call.

    Args:
        residual: [B, T, K], float32 (float64 where dtype is); updated in place.
        in_norm, in_packed, in_alpha, in_beta, in_bias: norm_weight, w_packed, alpha, beta and bias of the input
            projection, as of mamba2_in_step, with the rows z, x, B, C and dt: 2 H P + 2 G N + H.
        conv_state: [B, W - 1, H P + 2 G N], any floating dtype of activations, the inputs before these tokens, oldest
            first; overwritten with the last.
        conv_weight: [H P + 2 G N, W], any floating dtype, as conv_bias.
        conv_bias: [H P + 2 G N], optional.
        ssm_state: [B, H, P, N], float32, bfloat16 or float16 (float64 where dtype is), before these tokens; overwritten
            with that after them, rounded to nearest.
        A: [H]; D: [H] or [H, P], optional; dt_bias: [H]: of ssd_scan, with a softplus of the step sizes.
        out_norm, out_packed, out_alpha, out_beta, out_bias: of the output projection, as of mamba2_out_step.
        dtype: of the activations between the projections: float32, bfloat16 or float16 (float64 on the CPU).
        in_eps, out_eps: added to the mean squares.

    Not differentiable.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    torch.ops.bitkernels.mamba2_prompt(
        residual, in_norm, in_packed, in_alpha, in_beta, in_bias, conv_state, conv_weight, conv_bias, ssm_state, A, D,
        dt_bias, out_norm, out_packed, out_alpha, out_beta, out_bias, dtype, in_eps, out_eps,
    )  # fmt: skip


def moved_on(states: Tensor, xbc: Tensor) -> Tensor:
    """The last W - 1 of ``states`` [B, W - 1, C] and ``xbc`` [B, T, C] after them, in either's type."""
    width = states.shape[1]
    read = xbc[:, max(0, xbc.shape[1] - width) :]
    return read if read.shape[1] == width else torch.cat([states, read.to(states.dtype)], 1)[:, read.shape[1] :]


@torch.library.impl("bitkernels::mamba2_prompt", "CompositeExplicitAutograd")
def _(
    residual, in_norm, in_packed, in_alpha, in_beta, in_bias, conv_state, conv_weight, conv_bias, ssm_state, A, D,
    dt_bias, out_norm, out_packed, out_alpha, out_beta, out_bias, dtype, in_eps=1e-5, out_eps=1e-5,
):  # fmt: skip
    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"mamba2_prompt: {message}")

    require(residual.dim() == 3, f"residual must be [B, T, K], got {list(residual.shape)}")
    batch, _, width = residual.shape
    fits = ssm_state.dim() == 4 and ssm_state.shape[0] == batch
    require(fits, f"ssm_state must be [{batch}, H, P, N], got {list(ssm_state.shape)}")
    _, heads, head_dim, state = ssm_state.shape
    require(conv_weight.dim() == 2, f"conv_weight must be [C, W], got {list(conv_weight.shape)}")
    channels, taps = conv_weight.shape
    both = channels - heads * head_dim
    fits = both > 0 and state > 0 and both % (2 * state) == 0
    require(fits, f"conv_weight must have {heads * head_dim} + 2 G N channels, N = {state}, got {channels}")
    fits = list(conv_state.shape) == [batch, taps - 1, channels]
    require(fits, f"conv_state must be [{batch}, {taps - 1}, {channels}], got {list(conv_state.shape)}")
    require(list(A.shape) == [heads], f"A must be of shape [{heads}], got {list(A.shape)}")
    rows = heads * head_dim + channels + heads
    require(in_packed.shape[0] == rows, f"in_packed must have {rows} rows, z, x, B, C and dt, got {in_packed.shape[0]}")
    ops, total = torch.ops.bitkernels, residual.reshape(-1, width)
    projected = ops.mamba2_in_step(
        total, in_norm, in_packed, in_alpha, in_beta, None, None, None, 0, dtype, in_bias, in_eps
    ).view(*residual.shape[:2], rows)
    y, final_state = gated_mixer(
        projected, conv_weight, conv_bias, dt_bias, A, D, conv_state, ssm_state, None, both // (2 * state)
    )
    inputs = projected[..., heads * head_dim : heads * head_dim + channels]
    conv_state.copy_(moved_on(conv_state, inputs))
    ssm_state.copy_(final_state)
    ops.mamba2_out_step(total, y.view(-1, y.shape[-1]), out_norm, out_packed, out_alpha, out_beta, out_bias, out_eps)
    if total.data_ptr() != residual.data_ptr():
        residual.copy_(total.view_as(residual))


@torch.library.register_fake("bitkernels::mamba2_prompt")
def _(residual, *arguments):
    torch._check(residual.dim() == 3, lambda: f"mamba2_prompt: residual must be [B, T, K], got {list(residual.shape)}")
