"""The forward convolution: of few tokens in CUDA C++, else in Triton."""

import torch
from torch import Tensor

# Up to which Triton, whose kernel is faster by a fifth, is not worth its start: half a second of a process, and seconds
# where nothing was compiled before. A fifth is 2 us of 256 tokens, 4 of 2048.
FEW_TOKENS = 1024

_HAS_KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key("bitkernels::causal_conv1d_cuda", "CUDA")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """``bitkernels::causal_conv1d``."""
    tensors = x, weight, bias, initial_state, seq_idx, cu_seqlens
    if _HAS_KERNEL and x.is_cuda and x.shape[:-1].numel() <= FEW_TOKENS:
        return torch.ops.bitkernels.causal_conv1d_cuda.default(*tensors, silu)
    from bitkernels.triton import causal_conv1d as in_triton

    return in_triton.causal_conv1d(*tensors, silu)
