"""Writes just past a buffer on purpose: memcheck.sh must see it, or its clean result means nothing."""

import torch
import triton
import triton.language as tl


@triton.jit
def write_past_the_end(p_buffer, size):
    tl.store(p_buffer + size, 1.0)


buffer = torch.zeros(256, device="cuda")
write_past_the_end[(1,)](buffer, buffer.numel())
torch.cuda.synchronize()
