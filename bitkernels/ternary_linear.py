"""``ternary_linear``: a linear layer over packed ternary weights."""

import torch
from torch import Tensor

from bitkernels._ops import needed_grads


def ternary_linear(
    x: Tensor, w_packed: Tensor, scale: Tensor, bias: Tensor | None = None, act_bits: int | None = None
) -> Tensor:
    """``y = x @ (scale * Q)^T + bias`` with ``Q`` in {-1, 0, 1} packed, two bits a weight.

    The layer of Slender-Mamba (BitNet b1.58) at inference.

    Args:
        x: [..., K], float32, bfloat16 or float16 (float64 on the CPU).
        w_packed: uint32 [N, ceil(K/16)] from :func:`bitkernels.pack_ternary`.
        scale: [1], what a weight of 1 stands for: ``max(mean|W|, 1e-5)``.
        bias: [N], optional.
        act_bits: None keeps the activations as they are; 8 quantises them per token
            (:func:`bitkernels.quantize_int8`) and sums exactly in int32:
            ``y = float32(sum) * (scale / act_scale) + bias``, each step rounded once.

    Returns:
        [..., N] in x's dtype. Differentiable in x (straight through the quantisation), scale and bias.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    return torch.ops.bitkernels.ternary_linear(x, w_packed, scale, bias, act_bits)


@torch.library.register_fake("bitkernels::ternary_linear")
def _(x, w_packed, scale, bias=None, act_bits=None):
    torch._check(
        w_packed.dtype == torch.uint32, lambda: f"ternary_linear: w_packed must be uint32, got {w_packed.dtype}"
    )
    torch._check(w_packed.dim() == 2, lambda: f"ternary_linear: w_packed must be a matrix, got {w_packed.shape}")
    torch._check(
        w_packed.shape[1] == (x.shape[-1] + 15) // 16,
        lambda: f"ternary_linear: w_packed has {w_packed.shape[1]} words a row, x has K = {x.shape[-1]}",
    )
    return x.new_empty(*x.shape[:-1], w_packed.shape[0])


@torch.library.register_fake("bitkernels::ternary_linear_backward")
def _(grad, w_packed, scale, K):
    return grad.new_empty(*grad.shape[:-1], K)


def _setup_context(ctx, inputs, output):
    x, w_packed, scale, bias, act_bits = inputs
    ctx.save_for_backward(x, w_packed, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.act_bits = act_bits


def _backward(ctx, grad):
    x, w_packed, scale = ctx.saved_tensors
    need_x, _, need_scale, need_bias, _ = needed_grads(ctx, 5)
    dx = dscale = dbias = None
    if need_x:
        dx = torch.ops.bitkernels.ternary_linear_backward(grad, w_packed, scale, x.shape[-1])
    if need_scale:
        product = torch.ops.bitkernels.ternary_linear(x, w_packed, torch.ones_like(scale), None, ctx.act_bits)
        dscale = (grad.to(scale.dtype) * product.to(scale.dtype)).sum().reshape(scale.shape)
    if need_bias:
        dbias = grad.sum(tuple(range(grad.dim() - 1))).to(ctx.bias_dtype)
    return dx, None, dscale, dbias, None


torch.library.register_autograd("bitkernels::ternary_linear", _backward, setup_context=_setup_context)
