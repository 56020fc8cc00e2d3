"""``add_rms_norm``: what lies between two layers, the sum into the residual and the norm of the next layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)


def add_rms_norm(
    residual: Tensor, update: Tensor | None, weight: Tensor, dtype: torch.dtype, eps: float = 1e-5
) -> Tensor:
    """``residual += update``, then ``RMSNorm(residual) * weight`` over the last axis, in one pass over memory.

    Args:
        residual: [..., K], float32 (float64 where dtype is); updated in place.
        update: of residual's shape, float32, bfloat16 or float16 (float64 on the CPU); None adds nothing.
        weight: [K], any floating dtype.
        dtype: of the result: float32, bfloat16 or float16 (float64 on the CPU).
        eps: added to the mean square.

    Returns:
        [..., K] in dtype. Not differentiable.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    return torch.ops.bitkernels.add_rms_norm(residual, update, weight, dtype, eps)


def check(residual: Tensor, update: Tensor | None, weight: Tensor, dtype: torch.dtype) -> None:
    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"add_rms_norm: {message}")

    acc = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = (acc, torch.bfloat16, torch.float16)
    require(dtype in kinds, f"dtype must be float32, bfloat16 or float16, got {dtype}")
    require(residual.dtype == acc, f"residual must be {acc}, got {residual.dtype}")
    require(residual.dim() >= 1, "residual must have at least one dimension")
    for name, t in (("update", update), ("weight", weight)):
        require(t is None or t.device == residual.device, f"{name} must be on {residual.device}")
    if update is not None:
        shape = f"update must be of shape {list(residual.shape)}, got {list(update.shape)}"
        require(update.shape == residual.shape, shape)
        require(update.dtype in kinds, f"update must be float32, bfloat16 or float16, got {update.dtype}")
    K = residual.shape[-1]
    require(weight.shape == (K,), f"weight must be of shape [{K}], got {list(weight.shape)}")
    require(weight.is_floating_point(), f"weight must be a floating-point tensor, got {weight.dtype}")


@torch.library.impl("bitkernels::add_rms_norm", "CompositeExplicitAutograd")
def _(residual, update, weight, dtype, eps=1e-5):
    check(residual, update, weight, dtype)
    if residual.is_cuda:
        from bitkernels.triton.add_rms_norm import add_rms_norm as one_pass

        return one_pass(residual, update, weight, dtype, eps)
    if update is not None:
        residual.add_(update)
    y = F.rms_norm(residual, residual.shape[-1:], weight.to(residual.dtype), eps)
    return y.to(dtype)


@torch.library.register_fake("bitkernels::add_rms_norm")
def _(residual, update, weight, dtype, eps=1e-5):
    check(residual, update, weight, dtype)
    return residual.new_empty(residual.shape, dtype=dtype)
