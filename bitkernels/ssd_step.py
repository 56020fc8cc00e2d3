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
    state_indices: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """One token of :func:`bitkernels.ssd_scan`, for decoding: updates ``state`` in place.

    Args:
        state: [B, H, P, N], float32, bfloat16 or float16 (float64 where x is); overwritten with the
            state after this token. The arithmetic is float32 whatever the dtype. With state_indices
            [slots, H, P, N].
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
        state_indices: int32 or int64 [B], which state each request has; distinct. A request with a
            negative index is padding: it has no state, and its y is zero.
        seed: int64 [B]; with position, 16-bit states are rounded stochastically, without they are
            rounded to nearest. Over many tokens nearest rounding loses what is added in small steps.
        position: int64 [B], how many tokens each request has seen. Advance it on the device, and
            replays of a captured graph differ. The random bits depend on the seed, the position and
            the element alone, not on where the state is held; give every layer seeds of its own.

    Returns:
        y [B, H, P] in x's dtype. Not differentiable: train with ``ssd_scan``.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    dt_min, dt_max = dt_limit
    return torch.ops.bitkernels.ssd_step(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, None if dt_max == math.inf else dt_max,
        state_indices, seed, position,
    )  # fmt: skip


@torch.library.register_fake("bitkernels::ssd_step")
def _(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_min=0.0, dt_max=None,
    state_indices=None, seed=None, position=None,
):  # fmt: skip
    torch._check(x.dim() == 3, lambda: f"ssd_step: x must be [B, H, P], got {list(x.shape)}")
    return x.new_empty(x.shape)
