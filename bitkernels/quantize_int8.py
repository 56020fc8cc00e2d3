"""``quantize_int8``: per-token int8 activations."""

import torch
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises each token (each row along the last axis) to int8, as BitNet b1.58 does.

    In fp32 and in exactly this order: ``scale = 127 / max(absmax, 1e-5)``,
    ``q = clip(round_half_even(x * scale), -128, 127)``; ``x`` is about ``q / scale``.

    Args:
        x: [..., K], float32, bfloat16 or float16.

    Returns:
        q, int8 [..., K], and scale, float32 [...]. Not differentiable; layers pass gradients straight through.

    Raises:
        ValueError: ``x`` has no dimension or another dtype.
    """
    return torch.ops.bitkernels.quantize_int8(x)


def fake_quantize_int8(x: Tensor) -> Tensor:
    """x quantised to int8 per token and back, in x's dtype; no gradient."""
    return torch.ops.bitkernels.fake_quantize_int8(x)


@torch.library.register_fake("bitkernels::quantize_int8")
def _(x):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("bitkernels::fake_quantize_int8")
def _(x):
    return x.new_empty(x.shape)
