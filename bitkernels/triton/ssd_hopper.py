"""Which scans the CUDA C++ kernels for Hopper GPUs take (csrc/cuda/ssd_scan*_hopper.cu), and how they divide them.

They are built for 16-bit types, P = 64 and N = 64 or 128, know no ``seq_idx`` and ``cu_seqlens``, and their copy engine
wants everything on 16-byte boundaries. They walk a head in one thread block from beginning to end: with heads for a
small part of the GPU in the whole batch, the chunks of the Triton kernels are faster. In the forward several thread
blocks may share a sequence: each leads the state from its beginning and makes outputs of a part of it.
"""

import torch
from torch import Tensor

from bitkernels.triton.arguments import cdiv

BLOCK_T = 64
# Heads of the whole batch, in processors, from which on the kernels take a scan. In the forward they are faster than
# Triton's there, by half or more; fewer were not measured (docs/kernels/ssd_scan.md).
FORWARD_HEADS, BACKWARD_HEADS = 0.18, 0.3
# Of 64 tokens that only the state passes, in such with outputs: of 0.2 to 0.6 the fastest at T = 8192.
STATES_COST = 0.4
# Of a sequence: more would make less outputs each than states before them.
MAX_PARTS = 4
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


def fits(
    op: str,
    heads: float,
    x: Tensor,
    B: Tensor,
    tiles: tuple[Tensor | None, ...],
    states: tuple[Tensor | None, ...],
) -> bool:
    """What both directions of time ask for; ``tiles`` are read by the copy engine."""
    if not (x.is_cuda and torch._C._dispatch_has_kernel_for_dispatch_key(f"bitkernels::{op}", "CUDA")):
        return False
    if x.dtype == torch.float32 or x.shape[3] != 64 or B.shape[3] not in (64, 128):
        return False
    if not all(boxed(t) for t in tiles if t is not None):
        return False
    if any(t.data_ptr() % 16 != 0 for t in states if t is not None):
        return False
    device = torch.cuda.get_device_properties(x.device)
    return (device.major, device.minor) == (9, 0) and x.shape[0] * x.shape[2] >= heads * device.multi_processor_count


def on_hopper(x, B, C, z, initial_states, seq_idx, cu_seqlens) -> bool:
    """Whether the kernel of the forward scan takes it."""
    if seq_idx is not None or cu_seqlens is not None:
        return False
    return fits("ssd_scan_hopper", FORWARD_HEADS, x, B, (x, B, C, z), (initial_states,))


def forward_parts(x: Tensor) -> int:
    """Thread blocks that share a sequence: as many as run at once and have outputs to make."""
    batch, T, H, _ = x.shape
    at_once = torch.cuda.get_device_properties(x.device).multi_processor_count // (batch * H)
    return max(1, min(at_once, MAX_PARTS, cdiv(T, BLOCK_T)))


def forward_turns(x: Tensor) -> int:
    """Second parts that a processor without a first one makes, where a sequence has two and they do not all run at
    once; 1 where it has not. Pays for gated outputs alone: a state passes them at less of their cost."""
    batch, T, H, _ = x.shape
    idle = torch.cuda.get_device_properties(x.device).multi_processor_count - batch * H
    turns = cdiv(batch * H, idle) if idle > 0 and T > BLOCK_T else 1
    return turns if turns * STATES_COST < 1 else 1


def row_bytes(x: Tensor, B: Tensor) -> int:
    """Of the states of a sequence before every block, and the gradients of those after it."""
    _, T, H, P = x.shape
    return 2 * cdiv(T, BLOCK_T) * H * P * B.shape[3] * x.element_size()


def backward_on_hopper(dy, dfinal_states, x, dt, B, C, D, z, initial_states, seq_idx, cu_seqlens) -> bool:
    """Whether the kernels of the backward scan take it: one D a head."""
    if seq_idx is not None or cu_seqlens is not None or dt.dtype == torch.float64 or (D is not None and D.dim() > 1):
        return False
    return fits("ssd_scan_backward_hopper", BACKWARD_HEADS, x, B, (dy, x, B, C, z), (dfinal_states, initial_states))


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
