"""``ternary_linear_ste``: BitLinear in training, straight through both quantisations."""

import torch
from torch import Tensor

from bitkernels._ops import needed_grads
from bitkernels.quantize_int8 import fake_quantize_int8
from bitkernels.sign_linear import weight_product


def ternary_linear_ste(x: Tensor, weight: Tensor, bias: Tensor | None = None, act_bits: int | None = 8) -> Tensor:
    """``y = x_q @ W~^T + bias`` with ternary ``W~`` of a latent weight and int8 activations.

    The training form of Slender-Mamba's BitLinear (BitNet b1.58), without the RMSNorm before it:
    ``s = 1 / max(mean|W|, 1e-5)``, ``Q = clip(round(W s), -1, 1)``, ``W~ = Q / s``. The gradient of
    both quantisations is the identity; the weight's gradient sees the quantised activations.

    Args:
        x: [..., K], float32, bfloat16 or float16 (float64 on the CPU).
        weight: [N, K] latent weight, any floating-point dtype.
        bias: [N], optional.
        act_bits: 8, or None for activations as they are.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    return torch.ops.bitkernels.ternary_linear_ste(x, weight, bias, act_bits)[0]


def ternary_scale(weight: Tensor) -> Tensor:
    """``1/s = max(mean|W|, 1e-5)`` of a latent weight, shape [1], fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    # By rows: on a CPU vector_norm adds up one number after the other, which in fp32 is wrong for millions.
    rows = torch.linalg.vector_norm(weight, 1, dim=-1, dtype=wide)
    return (rows.sum() / weight.numel()).clamp(min=1e-5).reshape(1)


def quantize_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A latent weight [N, K] to packed ternary weights and their scale [1]; writes nothing of the weight's size."""
    scale = ternary_scale(weight)
    return torch.ops.bitkernels.pack_ternary(weight, scale), scale


@torch.library.impl("bitkernels::ternary_linear_ste", "CompositeExplicitAutograd")
def _(x, weight, bias=None, act_bits=8):
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"ternary_linear_ste: weight must be [N, {x.shape[-1]}], got {list(weight.shape)}")
    w_packed, scale = quantize_ternary(weight)
    return torch.ops.bitkernels.ternary_linear(x, w_packed, scale, bias, act_bits), w_packed, scale


@torch.library.register_fake("bitkernels::ternary_linear_ste")
def _(x, weight, bias=None, act_bits=8):
    torch._check(
        weight.shape[1] == x.shape[-1],
        lambda: f"ternary_linear_ste: weight must be [N, {x.shape[-1]}], got {list(weight.shape)}",
    )
    w_packed, scale = quantize_ternary(weight)
    return torch.ops.bitkernels.ternary_linear(x, w_packed, scale, bias, act_bits), w_packed, scale


def _setup_context(ctx, inputs, output):
    x, weight, bias, act_bits = inputs
    _, w_packed, scale = output
    ctx.mark_non_differentiable(w_packed, scale)
    ctx.save_for_backward(x, w_packed, scale)
    ctx.weight_dtype = weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.act_bits = act_bits


def _backward(ctx, grad, *_):
    x, w_packed, scale = ctx.saved_tensors
    need_x, need_weight, need_bias, _ = needed_grads(ctx, 4)
    dx = dweight = dbias = None
    if need_x:
        dx = torch.ops.bitkernels.ternary_linear_backward(grad, w_packed, scale, x.shape[-1])
    if need_weight:
        x = fake_quantize_int8(x) if ctx.act_bits == 8 else x
        dweight = weight_product(grad, x, ctx.weight_dtype).to(ctx.weight_dtype)
    if need_bias:
        dbias = grad.sum(tuple(range(grad.dim() - 1))).to(ctx.bias_dtype)
    return dx, dweight, dbias, None


torch.library.register_autograd("bitkernels::ternary_linear_ste", _backward, setup_context=_setup_context)
