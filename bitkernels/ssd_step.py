"""``ssd_step``: one token of the state-space recurrence of Mamba-2."""

import math

import torch
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """One token of :func:`bitkernels.ssd_scan`, for decoding: updates ``state`` in place.

    Args:
        state: [B, H, P, N], float32, bfloat16 or float16 (float64 where x is); overwritten with the
            state after this token. The arithmetic is float32 whatever the dtype; 16-bit states are
            rounded to nearest.
        x: [B, H, P], float32, bfloat16 or float16 (float64 on the CPU).
        dt: [B, H], any floating dtype; the step sizes before bias and softplus.
        A: [H], negative.
        B: [B, G, N] in x's dtype; G divides H.
        C: as B.
        D: [H] or [H, P], the skip connection; optional.
        z: [B, H, P] in x's dtype, the gate; optional.
        dt_bias: [H], optional.
        dt_softplus: whether softplus is applied to dt.
        dt_limit: range dt is clamped to, at last.

    Returns:
        y [B, H, P] in x's dtype. Not differentiable: train with ``ssd_scan``.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    dt_min, dt_max = dt_limit
    return torch.ops.bitkernels.ssd_step(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, None if dt_max == math.inf else dt_max
    )


@torch.library.register_fake("bitkernels::ssd_step")
def _(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_min=0.0, dt_max=None):
    torch._check(x.dim() == 3, lambda: f"ssd_step: x must be [B, H, P], got {list(x.shape)}")
    return x.new_empty(x.shape)
