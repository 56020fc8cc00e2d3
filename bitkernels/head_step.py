"""``head_step``: the logits of a decode step."""

import torch
from torch import Tensor

from bitkernels import dense_linear


def head_step(residual: Tensor, norm_weight: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm of the residual, rounded to weight's dtype, times ``weight^T``: the last norm and the head of a model.

    On Hopper GPUs one token (B = 1) with a dense 16-bit weight is one kernel, where norm_weight is float32 and the
    width a multiple of 8 of at most 6424.

    Args:
        residual: [B, width], float32 (float64 where weight is).
        norm_weight: [width], any floating dtype.
        weight: [V, width], float32, bfloat16 or float16 (float64 on the CPU).
        eps: added to the mean square.

    Returns:
        [B, V] in weight's dtype. Not differentiable.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    return torch.ops.bitkernels.head_step(residual, norm_weight, weight, eps)


def _check(residual: Tensor, norm_weight: Tensor, weight: Tensor) -> None:
    def check(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"head_step: {message}")

    check(weight.dim() == 2, f"weight must be [V, width], got {list(weight.shape)}")
    check(weight.is_floating_point(), f"weight must be a floating-point tensor, got {weight.dtype}")
    width, acc = weight.shape[1], torch.float64 if weight.dtype == torch.float64 else torch.float32
    check(residual.dtype == acc, f"residual must be {acc}, got {residual.dtype}")
    shape = list(residual.shape)
    check(len(shape) == 2 and shape[1] == width, f"residual must be [B, {width}], got {shape}")
    check(norm_weight.is_floating_point(), f"norm_weight must be a floating-point tensor, got {norm_weight.dtype}")
    check(list(norm_weight.shape) == [width], f"norm_weight must be of shape [{width}], got {list(norm_weight.shape)}")
    for name, t in (("norm_weight", norm_weight), ("weight", weight)):
        check(t.device == residual.device, f"{name} must be on the device of the first argument")


def _run(residual: Tensor, norm_weight: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """``bitkernels::head_step``."""
    _check(residual, norm_weight, weight)
    if residual.is_cuda and _HAS_KERNEL and residual.shape[0] == 1 and weight.element_size() == 2:
        logits = weight.new_empty(residual.shape[0], weight.shape[0])
        if torch.ops.bitkernels.head_step_hopper(residual, norm_weight, weight, logits, eps):
            return logits
    normed = torch.ops.bitkernels.add_rms_norm(None, residual, norm_weight, eps, weight.dtype)[1]
    return dense_linear(normed, weight)


_HAS_KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key("bitkernels::head_step_hopper", "CUDA")
for _key in ("CPU", "CUDA"):
    torch.library.impl("bitkernels::head_step", _key, _run)


@torch.library.register_fake("bitkernels::head_step")
def _(residual, norm_weight, weight, eps=1e-5):
    torch._check(weight.dim() == 2, lambda: f"head_step: weight must be [V, width], got {list(weight.shape)}")
    return weight.new_empty(residual.shape[0], weight.shape[0])
