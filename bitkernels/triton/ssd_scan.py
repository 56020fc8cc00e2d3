"""The forward SSD scan: on Hopper GPUs the usual case is CUDA C++, see ``ssd_hopper``, all else ``ssd_chunks``."""

import torch
from torch import Tensor

from bitkernels.triton.launch import layout, planned
from bitkernels.triton.mixer_arguments import check_scan
from bitkernels.triton.ssd_hopper import STATES_COST, forward_parts, forward_turns, on_hopper


class ScanPlan:
    """Checks arguments and plans the launches for them; call: y and the final states."""

    def __init__(
        self,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        initial_states,
        seq_idx,
        cu_seqlens,
        dt_softplus,
        dt_min,
        dt_max,
        chunk_size,
    ):
        sequences = check_scan(
            "ssd_scan", x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_min, dt_max, chunk_size
        )
        self.hopper = x.numel() > 0 and on_hopper(x, B, C, z, initial_states, seq_idx, cu_seqlens)
        if self.hopper:
            parts = forward_parts(x)
            turns = forward_turns(x) if parts == 1 and z is not None else 1
            self.options = dt_softplus, dt_min, dt_max, 2 if turns > 1 else parts, STATES_COST, turns
            self.scan = torch.ops.bitkernels.ssd_scan_hopper.default
        elif x.numel() > 0:
            from bitkernels.triton.ssd_chunks import ChunkedScan

            self.scan = ChunkedScan(x, dt, B, C, D, z, seq_idx, cu_seqlens, sequences, dt_softplus, dt_min, dt_max)
        else:
            self.final_shape = sequences, *x.shape[2:], B.shape[3]

    def __call__(self, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens) -> tuple[Tensor, Tensor]:
        if self.hopper:
            return self.on_hopper(x, dt, A, B, C, D, z, dt_bias, initial_states)[:2]
        if x.numel() > 0:
            return self.scan(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens)
        final = torch.zeros(self.final_shape, dtype=torch.float32, device=x.device)
        return x.new_empty(x.shape), final if initial_states is None else final.copy_(initial_states)

    def on_hopper(self, *tensors, squares: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return self.scan(*tensors, *self.options, squares)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """``bitkernels::ssd_scan``. ``chunk_size`` is a hint this implementation does not take."""
    tensors = x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens
    return _plan(tensors, (dt_softplus, dt_min, dt_max, chunk_size))(*tensors)


def _plan(tensors: tuple[Tensor | None, ...], options: tuple) -> ScanPlan:
    return planned(("ssd_scan", options, *map(layout, tensors)), lambda: ScanPlan(*tensors, *options))


def gated_scan(*arguments) -> tuple[Tensor, Tensor, Tensor | None]:
    """``ssd_scan`` with z, and the sums of the squares of each head's outputs [B, H, T] where they cost nothing."""
    tensors, options = arguments[:11], arguments[11:]
    plan = _plan(tensors, options)
    if plan.hopper:
        return plan.on_hopper(*tensors[:9], squares=True)
    return *plan(*tensors), None
