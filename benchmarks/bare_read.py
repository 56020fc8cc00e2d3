"""A read of a tensor as one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # elements of a program, 64 a thread: all its loads are under way at once


@triton.jit
def _read_kernel(data, found, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(data + at, mask=at < size, other=0), 0)
    # Practically never, but the compiler cannot know.
    if total == 0x5EED5EED:
        tl.store(found, total)


def read(tensor: Tensor) -> Tensor:
    """Of 32-bit elements, dense."""
    words = tensor.view(torch.int32)
    found = words.new_empty(1)
    _read_kernel[(triton.cdiv(words.numel(), BLOCK),)](words, found, words.numel(), BLOCK)
    return found
