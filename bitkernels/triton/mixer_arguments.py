"""Argument checks of the Mamba-2 operators, with the words of their CPU implementations."""

import torch
from torch import Tensor

from bitkernels.triton.arguments import ACTIVATIONS, check, check_device, check_shape, fail

_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
}


def _name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype))


def check_activation(op: str, argument: str, t: Tensor) -> None:
    if t.dtype not in ACTIVATIONS:
        fail(op, f"{argument} must be float32, bfloat16 or float16, got {_name(t.dtype)}")


def check_rank(op: str, argument: str, t: Tensor, form: str) -> None:
    if t.dim() != form.count(",") + 1:
        fail(op, f"{argument} must be {form}, got {list(t.shape)}")


def check_like(op: str, argument: str, t: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    """On x's device, in x's dtype."""
    if t is None:
        return
    check_device(op, argument, t, x)
    if t.dtype != x.dtype:
        fail(op, f"{argument} must be {_name(x.dtype)}, got {_name(t.dtype)}")
    check_shape(op, argument, t, shape)


def check_floating(op: str, argument: str, t: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    """On x's device, in any floating dtype."""
    if t is None:
        return
    check_device(op, argument, t, x)
    if not t.is_floating_point():
        fail(op, f"{argument} must be a floating-point tensor, got {_name(t.dtype)}")
    check_shape(op, argument, t, shape)


def check_integer(op: str, argument: str, t: Tensor, x: Tensor) -> None:
    check_device(op, argument, t, x)
    check(t.dtype in (torch.int32, torch.int64), op, f"{argument} must be int32 or int64, got {_name(t.dtype)}")


def check_seq_idx(op: str, seq_idx: Tensor | None, x: Tensor) -> None:
    if seq_idx is not None:
        check_integer(op, "seq_idx", seq_idx, x)
        check_shape(op, "seq_idx", seq_idx, tuple(x.shape[:2]))


def check_sequences(op: str, cu_seqlens: Tensor | None, x: Tensor) -> int:
    """Returns their number. Their values stay on the device: reading them would wait for it."""
    if cu_seqlens is None:
        return x.shape[0]
    check_integer(op, "cu_seqlens", cu_seqlens, x)
    fits = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1
    check(fits, op, f"cu_seqlens must be [S + 1], got {list(cu_seqlens.shape)}")
    check(x.shape[0] == 1, op, f"x must have a batch of one with cu_seqlens, got {list(x.shape)}")
    return cu_seqlens.shape[0] - 1


def check_heads(op, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max) -> None:
    """What scan and step share; B is checked to have the leading dimensions of x, [B, T] or [B]."""
    lead, H, P = tuple(x.shape[:-2]), x.shape[-2], x.shape[-1]
    G, N = B.shape[-2:]
    check_floating(op, "dt", dt, x, (*lead, H))
    check_like(op, "B", B, x, (*lead, G, N))
    if G <= 0 or H % G != 0:
        fail(op, f"B must have a number of groups that divides {H} heads, got {list(B.shape)}")
    check_like(op, "C", C, x, (*lead, G, N))
    check_floating(op, "A", A, x, (H,))
    if D is not None:
        if D.shape not in ((H,), (H, P)):
            fail(op, f"D must be of shape [{H}] or [{H}, {P}], got {list(D.shape)}")
        check_floating(op, "D", D, x, D.shape)
    check_floating(op, "dt_bias", dt_bias, x, (H,))
    check_like(op, "z", z, x, tuple(x.shape))
    if dt_max is not None:
        check(dt_min <= dt_max, op, f"dt_limit must be increasing, got ({dt_min:g}, {dt_max:g})")


def check_scan(
    op, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_min, dt_max, chunk_size
) -> int:
    """Returns the number of sequences."""
    check_activation(op, "x", x)
    check_rank(op, "x", x, "[B, T, H, P]")
    check_rank(op, "B", B, "[B, T, G, N]")
    check(chunk_size > 0, op, f"chunk_size must be positive, got {chunk_size}")
    check_heads(op, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max)
    check_seq_idx(op, seq_idx, x)
    sequences = check_sequences(op, cu_seqlens, x)
    state = (sequences, x.shape[2], x.shape[3], B.shape[3])
    check_floating(op, "initial_states", initial_states, x, state)
    return sequences


def check_backward(
    dy, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_min, dt_max, chunk_size
) -> int:
    """Of the scan; returns the number of sequences."""
    op = "ssd_scan_backward"
    sequences = check_scan(
        op, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_min, dt_max, chunk_size
    )
    check_like(op, "dy", dy, x, tuple(x.shape))
    check_floating(op, "dfinal_states", dfinal_states, x, (sequences, *x.shape[2:], B.shape[3]))
    return sequences


def check_step(op, state, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max, state_indices, seed, position) -> None:
    check_activation(op, "x", x)
    check_activation(op, "state", state)
    check_rank(op, "x", x, "[B, H, P]")
    check_rank(op, "B", B, "[B, G, N]")
    check_device(op, "state", state, x)
    check_heads(op, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max)
    batch, H, P = x.shape
    if state_indices is not None:
        # Its values stay on the device; the kernel takes those that are too large for padding.
        check_rank(op, "state", state, "[slots, H, P, N]")
        check_integer(op, "state_indices", state_indices, x)
        check_shape(op, "state_indices", state_indices, (batch,))
    slots = batch if state_indices is None else state.shape[0]
    check_shape(op, "state", state, (slots, H, P, B.shape[2]))
    check((seed is None) == (position is None), op, "seed and position must be given together")
    for argument, t in (("seed", seed), ("position", position)):
        if t is not None:
            check_device(op, argument, t, x)
            check(t.dtype == torch.int64, op, f"{argument} must be Long, got {_name(t.dtype)}")
            check_shape(op, argument, t, (batch,))


def check_taps(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    C = x.shape[-1]
    fits = weight.dim() == 2 and weight.shape[0] == C and weight.shape[1] >= 1
    check(fits, op, f"weight must be of shape [{C}, W], got {list(weight.shape)}")
    check_floating(op, "weight", weight, x, tuple(weight.shape))
    check_floating(op, "bias", bias, x, (C,))


def check_convolution(op, x, weight, bias, initial_state, seq_idx, cu_seqlens) -> int:
    """Returns the number of sequences."""
    check_activation(op, "x", x)
    check_rank(op, "x", x, "[B, T, C]")
    check_taps(op, x, weight, bias)
    sequences = check_sequences(op, cu_seqlens, x)
    check_floating(op, "initial_state", initial_state, x, (sequences, weight.shape[1] - 1, x.shape[2]))
    check_seq_idx(op, seq_idx, x)
    return sequences


def check_norm(op: str, x: Tensor, z: Tensor, weight: Tensor, group_size: int | None) -> None:
    check_activation(op, "x", x)
    check(x.dim() >= 1, op, "x must have at least one dimension")
    check_like(op, "z", z, x, tuple(x.shape))
    D = x.shape[-1]
    check_floating(op, "weight", weight, x, (D,))
    fits = group_size is None or (group_size > 0 and D % group_size == 0)
    check(fits, op, f"group_size must divide the last axis of x, {D}, got {group_size}")
