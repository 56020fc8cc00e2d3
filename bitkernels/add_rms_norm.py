"""``add_rms_norm``: a block's output into the residual stream, and the norm that the next block reads.

``rms_norm`` is that norm alone, where the residual has the output already.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)
from bitkernels._autograd import skipping_autograd
from bitkernels.ssd_scan import acc_dtype

_add_norm = skipping_autograd(torch.ops.bitkernels.add_rms_norm.default)


def add_rms_norm(
    residual: Tensor | None, branch: Tensor, weight: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``total = residual + branch``, and ``total / sqrt(mean(total^2) + eps) * weight`` over the last axis.

    Args:
        residual: [..., width], float32 (float64 where branch is); None for zero, where a stream begins.
        branch: [..., width], float32, bfloat16 or float16 (float64 on the CPU).
        weight: [width], any floating dtype.
        eps: added to the mean square.
        dtype: of the norm, a floating one; branch's if not given.

    Returns:
        (total, in float32, float64 where branch is; the norm). Differentiable in residual, branch and weight.

    Raises:
        ValueError: an argument's dtype or shape does not fit; the message names it.
    """
    if not (dtype is None or dtype.is_floating_point):
        raise ValueError(f"add_rms_norm: dtype must be a floating dtype, got {dtype}")
    return _add_norm(residual, branch, weight, eps, dtype or branch.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in one pass, for inference.

    Args:
        x: [..., width], float32, bfloat16 or float16 (float64 on the CPU).
        weight: [width], any floating dtype.
        eps: added to the mean square.
        dtype: of the result, a floating one; x's if not given.

    Returns:
        The norm. Not differentiable.

    Raises:
        ValueError: an argument's dtype or shape does not fit; the message names it.
    """
    if not (dtype is None or dtype.is_floating_point):
        raise ValueError(f"rms_norm: dtype must be a floating dtype, got {dtype}")
    return torch.ops.bitkernels.rms_norm(x, weight, eps, dtype or x.dtype)


def _check_norm(op: str, name: str, x: Tensor, weight: Tensor) -> None:
    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{op}: {message}")

    require(x.dim() >= 1, f"{name} must have at least one dimension")
    require(x.is_floating_point(), f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    width = list(x.shape[-1:])
    require(weight.is_floating_point(), f"weight must be a floating-point tensor, got {weight.dtype}")
    require(list(weight.shape) == width, f"weight must be of shape {width}, got {list(weight.shape)}")


def _check(residual: Tensor | None, branch: Tensor, weight: Tensor) -> None:
    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"add_rms_norm: {message}")

    _check_norm("add_rms_norm", "branch", branch, weight)
    shape = list(branch.shape)
    if residual is not None:
        acc = acc_dtype(branch.dtype)
        require(residual.dtype == acc, f"residual must be {acc}, got {residual.dtype}")
        require(list(residual.shape) == shape, f"residual must be of shape {shape}, got {list(residual.shape)}")


@torch.library.impl("bitkernels::add_rms_norm", "CompositeExplicitAutograd")
def _(residual, branch, weight, eps, dtype):
    _check(residual, branch, weight)
    acc = acc_dtype(branch.dtype)
    total = branch.to(acc, copy=True) if residual is None else residual + branch
    return total, F.rms_norm(total, weight.shape, weight.to(acc), eps).to(dtype)


@torch.library.impl("bitkernels::rms_norm", "CompositeExplicitAutograd")
def _(x, weight, eps, dtype):
    _check_norm("rms_norm", "x", x, weight)
    acc = acc_dtype(x.dtype)
    return F.rms_norm(x.to(acc), weight.shape, weight.to(acc), eps).to(dtype)


@torch.library.impl("bitkernels::add_rms_norm_backward", "CompositeExplicitAutograd")
def _(dtotal, dnormed, total, weight, eps, branch_dtype):
    inverse = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    normed = total * inverse
    dnormed = torch.zeros_like(total) if dnormed is None else dnormed.to(total.dtype)
    dweight = (dnormed * normed).flatten(0, -2).sum(0) if total.dim() > 1 else dnormed * normed
    d = dnormed * weight.to(total.dtype)
    dresidual = (d - normed * (d * normed).mean(-1, keepdim=True)) * inverse
    if dtotal is not None:
        dresidual += dtotal
    return dresidual, dresidual.to(branch_dtype, copy=True), dweight


@torch.library.register_fake("bitkernels::add_rms_norm")
def _(residual, branch, weight, eps, dtype):
    _check(residual, branch, weight)
    return branch.new_empty(branch.shape, dtype=acc_dtype(branch.dtype)), branch.new_empty(branch.shape, dtype=dtype)


@torch.library.register_fake("bitkernels::rms_norm")
def _(x, weight, eps, dtype):
    _check_norm("rms_norm", "x", x, weight)
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("bitkernels::add_rms_norm_backward")
def _(dtotal, dnormed, total, weight, eps, branch_dtype):
    fresh = total.new_empty
    return fresh(total.shape), fresh(total.shape, dtype=branch_dtype), fresh(weight.shape)


def _setup_context(ctx, inputs, output):
    _, branch, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(output[0], weight)
    ctx.branch_dtype = branch.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, dtotal, dnormed):
    total, weight = ctx.saved_tensors
    grads = torch.ops.bitkernels.add_rms_norm_backward(dtotal, dnormed, total, weight, ctx.eps, ctx.branch_dtype)
    residual, branch, dweight = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
    return residual, branch, None if dweight is None else dweight.to(weight.dtype), None, None


torch.library.register_autograd("bitkernels::add_rms_norm", _backward, setup_context=_setup_context)
