"""The forward SSD scan by chunks, see ``ssd_chunks``: all that CUDA C++ does not take (csrc/ssd_scan_hopper.cpp)."""

import torch
from torch import Tensor

from bitkernels.triton.launch import layout, planned
from bitkernels.triton.mixer_arguments import check_scan


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
        if x.numel() > 0:
            from bitkernels.triton.ssd_chunks import ChunkedScan

            self.scan = ChunkedScan(x, dt, B, C, D, z, seq_idx, cu_seqlens, sequences, dt_softplus, dt_min, dt_max)
        else:
            self.final_shape = sequences, *x.shape[2:], B.shape[3]

    def __call__(self, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens) -> tuple[Tensor, Tensor]:
        if x.numel() > 0:
            return self.scan(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens)
        final = torch.zeros(self.final_shape, dtype=torch.float32, device=x.device)
        return x.new_empty(x.shape), final if initial_states is None else final.copy_(initial_states)


def ssd_scan_chunks(
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
    """``bitkernels::ssd_scan_chunks``. ``chunk_size`` is a hint this implementation does not take."""
    tensors = x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens
    options = dt_softplus, dt_min, dt_max, chunk_size
    return planned(("ssd_scan", options, *map(layout, tensors)), lambda: ScanPlan(*tensors, *options))(*tensors)


# Where there is no CUDA C++.
ssd_scan = ssd_scan_chunks


def ssd_scan_division(*tensors: Tensor | None) -> tuple[int, float, int]:
    """``bitkernels::ssd_scan_division``: no kernel of CUDA C++ takes it."""
    return 0, 0.0, 1
