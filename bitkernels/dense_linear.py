"""``dense_linear``: the product with a full-precision or 8-bit head when tokens are few."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)

_HALVES = (torch.bfloat16, torch.float16)
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def dense_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """``y = x @ weight^T``, or ``x @ (scale[:, None] * weight)^T`` with an int8 weight.

    Made for a few tokens and a weight too large for a cache, which it reads once: the head of a decode step. Sums are
    float32 (float64 for float64), and a token's do not depend on the other tokens.

    Args:
        x: [..., K], float32, bfloat16 or float16 (float64 on the CPU).
        weight: [N, K], any floating dtype, or int8.
        scale: [N], where and only where weight is int8.

    Returns:
        [..., N] in x's dtype. Not differentiable.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    return torch.ops.bitkernels.dense_linear(x, weight, scale)


def torch_is_slow(x: Tensor) -> bool:
    """Whether torch's product with ``x`` is slower for any number of tokens: in 16 bits on a CPU without AVX-512."""
    return x.device.type == "cpu" and x.dtype in _HALVES and not _HAS_AVX512


# A GPU has torch's product.
@torch.library.impl("bitkernels::dense_linear", "CUDA")
def _(x, weight, scale=None):
    if (weight.dtype == torch.int8) != (scale is not None):
        raise ValueError(f"dense_linear: scale must be given where and only where weight is int8, got {weight.dtype}")
    # Scaled first: sums of unscaled integers can be beyond fp16.
    return F.linear(x, (weight if scale is None else weight * scale[:, None]).to(x.dtype))


@torch.library.register_fake("bitkernels::dense_linear")
def _(x, weight, scale=None):
    torch._check(weight.dim() == 2, lambda: f"dense_linear: weight must be a matrix, got {list(weight.shape)}")
    return x.new_empty(*x.shape[:-1], weight.shape[0])
