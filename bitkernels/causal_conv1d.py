"""``causal_conv1d``: the short depthwise convolution of Mamba-2, over sequences and token by token."""

import torch
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)
from bitkernels.ssd_scan import acc_dtype


def _is_silu(op: str, activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{op}: activation must be None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """Depthwise causal convolution over time: ``y_t = act(sum_w weight[:, w] x_{t - W + 1 + w} + bias)``.

    Args:
        x: [B, T, C], float32, bfloat16 or float16 (float64 on the CPU). May be a slice of a wider
            tensor: only its last axis has to be dense to be read in place.
        weight: [C, W], any floating dtype.
        bias: [C], optional.
        initial_state: [B, W - 1, C] ([S, W - 1, C] with cu_seqlens), the inputs before t = 0, oldest
            first; zero if not given.
        seq_idx: int32 or int64 [B, T]; inputs of another sequence count as zero. The initial state
            belongs to the sequence at t = 0.
        cu_seqlens: int32 or int64 [S + 1], from 0 to T: x holds S sequences, one after another, in a
            batch of one.
        activation: ``"silu"`` (also spelled ``"swish"``) or None.

    Returns:
        y [B, T, C] in x's dtype. Differentiable in x, weight, bias and initial_state.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    silu = _is_silu("causal_conv1d", activation)
    return torch.ops.bitkernels.causal_conv1d(x, weight, bias, initial_state, seq_idx, cu_seqlens, silu)


def causal_conv1d_step(
    conv_state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = "silu"
) -> Tensor:
    """One token of :func:`causal_conv1d`, for decoding: moves ``conv_state`` on in place.

    Args:
        conv_state: [B, W - 1, C], any floating dtype, the inputs before this token, oldest first;
            overwritten with the last W - 1 inputs.
        x: [B, C], float32, bfloat16 or float16 (float64 on the CPU).
        weight: [C, W], any floating dtype.
        bias: [C], optional.
        activation: ``"silu"`` (also spelled ``"swish"``) or None.

    Returns:
        y [B, C] in x's dtype. Not differentiable: train with ``causal_conv1d``.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    silu = _is_silu("causal_conv1d_step", activation)
    return torch.ops.bitkernels.causal_conv1d_step(conv_state, x, weight, bias, silu)


@torch.library.register_fake("bitkernels::causal_conv1d")
def _(x, weight, bias=None, initial_state=None, seq_idx=None, cu_seqlens=None, silu=True):
    torch._check(x.dim() == 3, lambda: f"causal_conv1d: x must be [B, T, C], got {list(x.shape)}")
    return x.new_empty(x.shape)


@torch.library.register_fake("bitkernels::causal_conv1d_backward")
def _(dy, x, weight, bias=None, initial_state=None, seq_idx=None, cu_seqlens=None, silu=True):
    acc = acc_dtype(x.dtype)
    none = x.new_empty(0, dtype=acc)
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=acc),
        none if bias is None else bias.new_empty(bias.shape, dtype=acc),
        torch.empty_like(none) if initial_state is None else x.new_empty(initial_state.shape),
    )


@torch.library.register_fake("bitkernels::causal_conv1d_step")
def _(conv_state, x, weight, bias=None, silu=True):
    torch._check(x.dim() == 2, lambda: f"causal_conv1d_step: x must be [B, C], got {list(x.shape)}")
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.silu = inputs[6]


def _backward(ctx, dy):
    tensors = ctx.saved_tensors
    grads = torch.ops.bitkernels.causal_conv1d_backward(dy, *tensors, ctx.silu)
    needed = zip(grads, tensors, ctx.needs_input_grad, strict=False)
    return *(g.to(t.dtype) if need else None for g, t, need in needed), None, None, None


torch.library.register_autograd("bitkernels::causal_conv1d", _backward, setup_context=_setup_context)
