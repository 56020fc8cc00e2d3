"""``ssd_scan``: the state-space recurrence of Mamba-2 over whole sequences."""

import math

import torch
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)
from bitkernels._autograd import register_autograd, skipping_autograd

_scan = skipping_autograd(torch.ops.bitkernels.ssd_scan.default)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The SSD scan of Mamba-2 (Dao and Gu, 2024), with the arguments of ``mamba_chunk_scan_combined``.

    ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`` and ``y_t = C_t h_t + D x_t``, then ``y_t * silu(z_t)``,
    where ``dt = clamp(softplus(dt + dt_bias), dt_limit)``. Batch ``B``, time ``T``, heads ``H``, head
    dimension ``P``, groups ``G``, state dimension ``N``; head ``h`` reads group ``h // (H / G)``.
    The arithmetic and the states are float32 (float64 for float64 inputs, on the CPU).

    Args:
        x: [B, T, H, P], float32, bfloat16 or float16 (float64 on the CPU). x, B, C and z may be
            slices of a wider tensor: only their last axis has to be dense to be read in place.
        dt: [B, T, H], any floating dtype; the step sizes before bias and softplus.
        A: [H], negative.
        B: [B, T, G, N] in x's dtype; G divides H.
        C: as B.
        chunk_size: a hint for the size of the blocks the work is done in; the result does not depend on it.
        D: [H] or [H, P], the skip connection; optional.
        z: [B, T, H, P] in x's dtype, the gate; optional.
        dt_bias: [H], optional.
        initial_states: [B, H, P, N] ([S, H, P, N] with cu_seqlens), any floating dtype; zero if not given.
        seq_idx: int32 or int64 [B, T]; the state restarts from zero where it changes.
        cu_seqlens: int32 or int64 [S + 1], from 0 to T: x holds S sequences, one after another, in a
            batch of one.
        dt_softplus: whether softplus is applied to dt.
        dt_limit: range dt is clamped to, at last.
        return_final_states: whether to return the states after the last token too.
        state_dtype: the floating dtype of the final states, float32 (float64 where x is) if not given;
            16-bit ones are rounded to nearest, at the end alone.

    Returns:
        y [B, T, H, P] in x's dtype, or (y, final states): [B, H, P, N] in state_dtype, or [S, H, P, N] with
        cu_seqlens. Differentiable in every floating-point argument, through the final states too.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    if not (state_dtype is None or state_dtype.is_floating_point):
        raise ValueError(f"ssd_scan: state_dtype must be a floating dtype, got {state_dtype}")
    dt_min, dt_max = dt_limit
    y, final_states = _scan(
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min,
        None if dt_max == math.inf else dt_max, chunk_size,
    )  # fmt: skip
    return (y, final_states.to(state_dtype or final_states.dtype)) if return_final_states else y


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("bitkernels::ssd_scan_chunks")
@torch.library.register_fake("bitkernels::ssd_scan")
def _(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_min=0.0, dt_max=None, chunk_size=64,
):  # fmt: skip
    torch._check(x.dim() == 4, lambda: f"ssd_scan: x must be [B, T, H, P], got {list(x.shape)}")
    torch._check(B.dim() == 4, lambda: f"ssd_scan: B must be [B, T, G, N], got {list(B.shape)}")
    batch, _, heads, headdim = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, heads, headdim, B.shape[3], dtype=acc_dtype(x.dtype))


@torch.library.register_fake("bitkernels::ssd_scan_backward")
def _(
    dy, dfinal_states, x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
    cu_seqlens=None, dt_softplus=False, dt_min=0.0, dt_max=None, chunk_size=64,
):  # fmt: skip
    acc = acc_dtype(x.dtype)

    def gradient(t, dtype):
        return x.new_empty(0, dtype=acc) if t is None else t.new_empty(t.shape, dtype=dtype)

    return (
        gradient(x, x.dtype), gradient(dt, dt.dtype), gradient(A, acc), gradient(B, B.dtype), gradient(C, C.dtype),
        gradient(D, acc), gradient(z, x.dtype), gradient(dt_bias, acc), gradient(initial_states, acc),
    )  # fmt: skip


@torch.library.register_fake("bitkernels::ssd_scan_hopper")
def _(
    x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, parts, states_cost, turns=1
):  # fmt: skip
    return torch.ops.bitkernels.ssd_scan(x, dt, A, B, C, D, z, dt_bias, initial_states)


@torch.library.register_fake("bitkernels::ssd_scan_backward_hopper")
def _(
    dy, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, rows, length, splits
):  # fmt: skip
    return torch.ops.bitkernels.ssd_scan_backward(dy, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:11])
    ctx.options = inputs[11:]
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal_states):
    tensors = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    grads = torch.ops.bitkernels.ssd_scan_backward(dy, dfinal_states, *tensors, *ctx.options)
    needed = zip(grads, tensors, ctx.needs_input_grad, strict=False)
    return *(g.to(t.dtype) if need else None for g, t, need in needed), *[None] * 6


register_autograd("ssd_scan", _backward, _setup_context)
