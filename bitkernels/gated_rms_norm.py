"""``gated_rms_norm``: the gate and the norm between Mamba-2's scan and its output projection."""

import torch
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)
from bitkernels.ssd_scan import acc_dtype


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-5, group_size: int | None = None) -> Tensor:
    """``RMSNorm(x * silu(z)) * weight`` over the last axis.

    Args:
        x: [..., width], float32, bfloat16 or float16 (float64 on the CPU).
        z: the gate, of x's shape and dtype. x and z may be slices of a wider tensor.
        weight: [width], any floating dtype.
        eps: added to the mean square.
        group_size: normalise groups of so many neighbours instead of the whole axis; divides width.

    Returns:
        [..., width] in x's dtype. Differentiable in x, z and weight.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    return torch.ops.bitkernels.gated_rms_norm(x, z, weight, eps, group_size)


@torch.library.register_fake("bitkernels::gated_rms_norm")
def _(x, z, weight, eps=1e-5, group_size=None):
    torch._check(
        x.shape == z.shape, lambda: f"gated_rms_norm: z must be of x's shape {list(x.shape)}, got {list(z.shape)}"
    )
    return x.new_empty(x.shape)


@torch.library.register_fake("bitkernels::gated_rms_norm_backward")
def _(dy, x, z, weight, eps=1e-5, group_size=None):
    return x.new_empty(x.shape), x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=acc_dtype(x.dtype))


def _setup_context(ctx, inputs, output):
    x, z, weight, ctx.eps, ctx.group_size = inputs
    ctx.save_for_backward(x, z, weight)


def _backward(ctx, dy):
    tensors = ctx.saved_tensors
    grads = torch.ops.bitkernels.gated_rms_norm_backward(dy, *tensors, ctx.eps, ctx.group_size)
    needed = zip(grads, tensors, ctx.needs_input_grad, strict=False)
    return *(g.to(t.dtype) if need else None for g, t, need in needed), None, None


torch.library.register_autograd("bitkernels::gated_rms_norm", _backward, setup_context=_setup_context)
