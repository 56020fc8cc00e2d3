"""``sign_linear``: FBI-Linear in training, straight through the sign."""

import torch
from torch import Tensor

from bitkernels._ops import needed_grads
from bitkernels.packed_linear import is_column_scale, row_scale_grads


def sign_linear(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x @ (alpha * sign(weight) + beta)^T + bias`` with the identity as the sign's gradient.

    The training form of Bi-Mamba's layer (eq. 4 and 5). The signs are packed once and shared by
    forward and backward; the dense ``W~`` is never kept. ``sign(0) = +1``. No clipping in the
    straight-through estimator: ``dW = alpha * (dY^T X)``. With ``H = dY @ S`` and column scales,
    ``dX = alpha * H + beta * sum_o dY``, ``dalpha = sum_t x * H``, ``dbeta = sum_t x * sum_o dY``.

    Args:
        x: [..., K], float32, bfloat16 or float16 (float64 on the CPU).
        weight: [N, K] latent weight, any floating-point dtype.
        alpha: [K] or [1, K] (column), [N, 1] (row) or [1] (single).
        beta: of alpha's shape.
        bias: [N], optional.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    return torch.ops.bitkernels.sign_linear(x, weight, alpha, beta, bias)[0]


@torch.library.impl("bitkernels::sign_linear", "CompositeExplicitAutograd")
def _(x, weight, alpha, beta, bias=None):
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"sign_linear: weight must be [N, {x.shape[-1]}] for x of K = {x.shape[-1]}, got {list(weight.shape)}"
        )
    w_packed = torch.ops.bitkernels.pack_sign(weight)
    return torch.ops.bitkernels.packed_linear(x, w_packed, alpha, beta, bias), w_packed


@torch.library.register_fake("bitkernels::sign_linear")
def _(x, weight, alpha, beta, bias=None):
    torch._check(
        weight.shape[1] == x.shape[-1],
        lambda: f"sign_linear: weight must be [N, {x.shape[-1]}], got {list(weight.shape)}",
    )
    w_packed = torch.ops.bitkernels.pack_sign(weight)
    return torch.ops.bitkernels.packed_linear(x, w_packed, alpha, beta, bias), w_packed


def _setup_context(ctx, inputs, output):
    x, weight, alpha, beta, bias = inputs
    _, w_packed = output
    ctx.mark_non_differentiable(w_packed)
    ctx.save_for_backward(x, w_packed, alpha, beta)
    ctx.weight_dtype = weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def weight_product(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``dY^T X`` over all tokens, [N, K]; in float32 where ``dtype`` is and the GPU can leave its sums there."""
    grad, x = (grad.flatten(0, -2), x.flatten(0, -2)) if grad.dim() > 1 else (grad[None], x[None])
    if grad.is_cuda and grad.dtype != dtype == torch.float32:
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return grad.t() @ x


@torch.library.register_fake("bitkernels::sign_linear_weight_backward")
def _(product, w_packed, alpha, weight_dtype, need_weight=True, need_scales=True):
    N, K = product.shape
    wide = torch.float64 if product.dtype == torch.float64 else torch.float32
    sums = (K if is_column_scale(alpha, K) else N) if need_scales else 0
    dweight = product.new_empty((N, K) if need_weight else 0, dtype=weight_dtype)
    return dweight, product.new_empty(sums, dtype=wide), product.new_empty(sums, dtype=wide)


def _backward(ctx, grad, _):
    x, w_packed, alpha, beta = ctx.saved_tensors
    need_x, need_weight, need_alpha, need_beta, need_bias = needed_grads(ctx, 5)
    K = x.shape[-1]
    column = is_column_scale(alpha, K)
    dx = dweight = dalpha = dbeta = dbias = None
    # The product G = dY^T X that makes the weight's gradient holds those of the scales: dalpha sums S * G, dbeta G.
    need_scales = need_alpha or need_beta
    product_needed = need_weight or (not column and need_scales)
    if need_x or (need_scales and not product_needed):
        dx, dalpha, dbeta = torch.ops.bitkernels.packed_linear_backward(
            grad, x, w_packed, alpha, beta, need_scales and not product_needed
        )
    if product_needed:
        # In bfloat16 as the dense layer's: half the bytes of float32 to write and to read. float16 might overflow.
        product = weight_product(grad, x, ctx.weight_dtype if grad.dtype == torch.float16 else grad.dtype)
        dweight, signed, total = torch.ops.bitkernels.sign_linear_weight_backward(
            product, w_packed, alpha, ctx.weight_dtype, need_weight, need_scales
        )
        if need_scales:
            dalpha = signed.reshape(alpha.shape).to(alpha.dtype) if column else row_scale_grads(signed, alpha)
            dbeta = total.reshape(beta.shape).to(beta.dtype) if column else row_scale_grads(total, beta)
    if need_bias:
        dbias = grad.sum(tuple(range(grad.dim() - 1))).to(ctx.bias_dtype)
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dalpha if need_alpha else None,
        dbeta if need_beta else None,
        dbias,
    )


torch.library.register_autograd("bitkernels::sign_linear", _backward, setup_context=_setup_context)
