"""Which scans the CUDA C++ kernels for Hopper GPUs take (csrc/cuda/ssd_scan*_hopper.cu), and plans for theirs.

They are built for 16-bit types, P = 64 and N = 64 or 128, know no ``seq_idx`` and ``cu_seqlens``, and their copy engine
wants everything on 16-byte boundaries. They walk a head in one thread block from beginning to end: with heads for less
than three tenths of the GPU in the whole batch, the chunks of the Triton kernels are faster.
"""

import torch
from torch import Tensor

from bitkernels.triton.arguments import cdiv

BLOCK_T = 64
# Of states and their gradients: what is held at once as long as that is a sequence or more, and what a sequence may take.
STATE_BYTES = 2**28
MAX_STATE_BYTES = 2**32
# What a thread block of the gradients does before and after its heads, in heads.
AROUND_HEADS = 2


def boxed(t: Tensor) -> bool:
    """[B, T, heads, columns] in 16 bits with every row of columns dense and on a 16-byte boundary."""
    strides = (stride for stride, size in zip(t.stride()[:3], t.shape[:3], strict=True) if size > 1)
    return t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)


def fits(op: str, x: Tensor, B: Tensor, tiles: tuple[Tensor | None, ...], states: tuple[Tensor | None, ...]) -> bool:
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
    return (device.major, device.minor) == (9, 0) and x.shape[0] * x.shape[2] >= 0.3 * device.multi_processor_count


def on_hopper(x, B, C, z, initial_states, seq_idx, cu_seqlens) -> bool:
    """Whether the kernel of the forward scan takes it."""
    return seq_idx is None and cu_seqlens is None and fits("ssd_scan_hopper", x, B, (x, B, C, z), (initial_states,))


def row_bytes(x: Tensor, B: Tensor) -> int:
    """Of the states of a sequence before every block, and the gradients of those after it."""
    _, T, H, P = x.shape
    return 2 * cdiv(T, BLOCK_T) * H * P * B.shape[3] * x.element_size()


def backward_on_hopper(dy, dfinal_states, x, dt, B, C, D, z, initial_states, seq_idx, cu_seqlens) -> bool:
    """Whether the kernels of the backward scan take it: no gate, one D a head, states that fit."""
    if not (z is None and seq_idx is None and cu_seqlens is None and (D is None or D.dim() == 1)):
        return False
    if dt.dtype == torch.float64 or row_bytes(x, B) > MAX_STATE_BYTES:
        return False
    return fits("ssd_scan_backward_hopper", x, B, (dy, x, B, C), (dfinal_states, initial_states))


class HopperBackward:
    """Plans the memory of the backward scan; call: the gradients."""

    def __init__(self, x: Tensor, B: Tensor, options: tuple):
        self.options = options
        batch, T, H, P = x.shape
        G, N = B.shape[2:]
        blocks = cdiv(T, BLOCK_T)
        # Whole sequences, in parts of the batch as equal as can be.
        rows = max(1, min(batch, STATE_BYTES // row_bytes(x, B)))
        rows = cdiv(batch, cdiv(batch, rows))
        slots = torch.cuda.get_device_properties(x.device).multi_processor_count

        def time(splits: int) -> int:
            """In heads, where the heads of a group are spread over thread blocks that each leave a sum."""
            return cdiv(rows * blocks * G * splits, slots) * (cdiv(H // G, splits) + AROUND_HEADS)

        splits = min(range(1, min(H // G, cdiv(2 * slots, rows * blocks * G)) + 1), key=time)
        self.states = 2, rows, blocks, H, P, N
        self.decays = rows, blocks, H, 3, BLOCK_T
        self.head_sums = batch, blocks, H, 3
        self.parts = (2, splits, *B.shape) if splits > 1 else None

    def __call__(self, dy, dfinal_states, x, dt, A, B, C, D, dt_bias, initial_states) -> tuple[Tensor, ...]:
        def fresh(shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=x.device)

        def like(t, dtype=torch.float32):
            return None if t is None else fresh(t.shape, dtype)

        dx, ddt, dA, dB, dC = like(x, x.dtype), like(dt, dt.dtype), like(A), like(B, B.dtype), like(C, C.dtype)
        dD, ddt_bias, dinitial = like(D), like(dt_bias), like(initial_states)
        parts = None if self.parts is None else fresh(self.parts)
        torch.ops.bitkernels.ssd_scan_backward_hopper.default(
            dy, dfinal_states, x, dt, A, B, C, D, dt_bias, initial_states, *self.options, fresh(self.states, x.dtype),
            fresh(self.decays), fresh(self.head_sums), parts, dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial,
        )  # fmt: skip
        given = dx, ddt, dA, dB, dC, dD, None, ddt_bias, dinitial
        return tuple(fresh(0) if t is None else t for t in given)
