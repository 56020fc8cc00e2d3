"""``ssd_scan_backward`` on CUDA: which scans the C++ kernels for Hopper GPUs take, and how they divide them
(csrc/cuda/ssd_scan_backward_hopper.cu). Of the forward csrc/ssd_scan_hopper.cpp decides that. Triton has the others,
and is not imported before one of them comes.

They are built for 16-bit types, P = 64 and N = 64 or 128, know no ``seq_idx`` and ``cu_seqlens``, and their copy engine
wants everything on 16-byte boundaries. They walk a head in one thread block from beginning to end: with heads for a
small part of the GPU in the whole batch, the chunks of the Triton kernels are faster.
"""

import torch
from torch import Tensor

from bitkernels.triton.arguments import cdiv
from bitkernels.triton.launch import layout, planned
from bitkernels.triton.mixer_arguments import check_backward

BLOCK_T = 64
# Heads of the whole batch, in processors, from which on they take a scan.
FEWEST_HEADS = 0.3
# Of states and their gradients: of sequences held at once, and of a sequence at once. Parts of a sequence cost another
# walk through it, as the states before all parts are needed first.
STATE_BYTES = 2**27
PART_BYTES = 2**29
# What a thread block of the gradients does before and after its heads, in heads.
AROUND_HEADS = 2


def boxed(t: Tensor) -> bool:
    """[B, T, heads, columns] in 16 bits with every row of columns dense and on a 16-byte boundary.

    Expanded axes have stride 0, which the copy engine's maps are not specified for.
    """
    strides = (stride for stride, size in zip(t.stride()[:3], t.shape[:3], strict=True) if size > 1)
    return t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in strides)


def row_bytes(x: Tensor, B: Tensor) -> int:
    """Of the states of a sequence before every block, and the gradients of those after it."""
    _, T, H, P = x.shape
    return 2 * cdiv(T, BLOCK_T) * H * P * B.shape[3] * x.element_size()


def backward_on_hopper(dy, dfinal_states, x, dt, B, C, D, z, initial_states, seq_idx, cu_seqlens) -> bool:
    """Whether the kernels of the backward scan take it: one D a head."""
    built = torch._C._dispatch_has_kernel_for_dispatch_key("bitkernels::ssd_scan_backward_hopper", "CUDA")
    if not (x.is_cuda and built):
        return False
    if seq_idx is not None or cu_seqlens is not None or dt.dtype == torch.float64 or (D is not None and D.dim() > 1):
        return False
    if x.dtype == torch.float32 or x.shape[3] != 64 or B.shape[3] not in (64, 128):
        return False
    if not all(boxed(t) for t in (dy, x, B, C, z) if t is not None):
        return False
    if any(t.data_ptr() % 16 != 0 for t in (dfinal_states, initial_states) if t is not None):
        return False
    device = torch.cuda.get_device_properties(x.device)
    enough = x.shape[0] * x.shape[2] >= FEWEST_HEADS * device.multi_processor_count
    return enough and (device.major, device.minor) == (9, 0)


def divide_backward(x: Tensor, B: Tensor) -> tuple[int, int, int]:
    """Sequences and tokens of them whose states are held at once, and thread blocks that share the heads of a group."""
    batch, T, H, _ = x.shape
    length = cdiv(cdiv(T, BLOCK_T), cdiv(row_bytes(x, B), PART_BYTES)) * BLOCK_T
    blocks, heads = cdiv(min(T, length), BLOCK_T) * B.shape[2], H // B.shape[2]
    slots = torch.cuda.get_device_properties(x.device).multi_processor_count

    def time(division: tuple[int, int]) -> int:
        """In heads: what a thread block goes through in each round."""
        rows, splits = division
        return cdiv(batch, rows) * cdiv(rows * blocks * splits, slots) * (cdiv(heads, splits) + AROUND_HEADS)

    most = max(1, min(batch, STATE_BYTES // row_bytes(x, B)))
    choices = [
        (rows, splits)
        for rows in range(1, most + 1)
        for splits in range(1, min(heads, cdiv(2 * slots, rows * blocks)) + 1)
    ]
    rows, splits = min(choices, key=time)
    return rows, length, splits


class HopperBackward:
    """Checks arguments, and what the kernels are told of them."""

    def __init__(
        self, dy, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus,
        dt_min, dt_max, chunk_size,
    ):  # fmt: skip
        check_backward(
            dy, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_min, dt_max,
            chunk_size,
        )  # fmt: skip
        self.options = None
        if x.numel() == 0:
            return
        dy = _rows(dy)
        if backward_on_hopper(dy, dfinal_states, x, dt, B, C, D, z, initial_states, seq_idx, cu_seqlens):
            self.options = dt_softplus, dt_min, dt_max, *divide_backward(x, B)


def _rows(dy: Tensor) -> Tensor:
    return dy if dy.stride(3) == 1 else dy.contiguous()


def ssd_scan_backward(
    dy: Tensor,
    dfinal_states: Tensor | None,
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
) -> tuple[Tensor, ...]:
    """``bitkernels::ssd_scan_backward``."""
    tensors = dy, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens
    options = dt_softplus, dt_min, dt_max, chunk_size
    own = planned(("on_hopper", options, *map(layout, tensors)), lambda: HopperBackward(*tensors, *options)).options
    if own is None:
        from bitkernels.triton.ssd_scan_backward import backward_by_chunks

        return backward_by_chunks(tensors, options)
    hopper = torch.ops.bitkernels.ssd_scan_backward_hopper.default
    return hopper(_rows(dy), dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, *own)
