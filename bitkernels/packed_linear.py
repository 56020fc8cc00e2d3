"""``packed_linear``: a linear layer over 1-bit weights with scales."""

import torch
from torch import Tensor

from bitkernels._autograd import skipping_autograd
from bitkernels._ops import needed_grads

_linear = skipping_autograd(torch.ops.bitkernels.packed_linear.default)


def packed_linear(x: Tensor, w_packed: Tensor, alpha: Tensor, beta: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x @ (alpha * S + beta)^T + bias`` with the signs ``S`` packed, one bit a weight.

    The layer of Bi-Mamba (eq. 4 and 5) at inference. No dense weight is made: with column scales
    ``y_o = sum_i S_oi (alpha_i x_i) + sum_i beta_i x_i``.

    Args:
        x: [..., K], float32, bfloat16 or float16 (float64 on the CPU).
        w_packed: uint32 [N, ceil(K/32)] from :func:`bitkernels.pack_sign`.
        alpha: scale of the signs, [K] or [1, K] (column, an input feature each), [N, 1] (row) or
            [1] (single). float32 avoids a conversion.
        beta: shift, of alpha's shape.
        bias: [N], optional.

    Returns:
        [..., N] in x's dtype. Differentiable in x, alpha, beta and bias.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    return _linear(x, w_packed, alpha, beta, bias)


def is_column_scale(alpha: Tensor, K: int) -> bool:
    """Whether alpha scales input features: [K] or [1, K]."""
    return alpha.dim() >= 1 and alpha.shape[-1] == K and alpha.numel() == K


@torch.library.register_fake("bitkernels::packed_linear")
def _(x, w_packed, alpha, beta, bias=None):
    torch._check(
        w_packed.dtype == torch.uint32, lambda: f"packed_linear: w_packed must be uint32, got {w_packed.dtype}"
    )
    torch._check(w_packed.dim() == 2, lambda: f"packed_linear: w_packed must be a matrix, got {w_packed.shape}")
    torch._check(
        w_packed.shape[1] == (x.shape[-1] + 31) // 32,
        lambda: f"packed_linear: w_packed has {w_packed.shape[1]} words a row, x has K = {x.shape[-1]}",
    )
    return x.new_empty(*x.shape[:-1], w_packed.shape[0])


@torch.library.register_fake("bitkernels::packed_linear_backward")
def _(grad, x, w_packed, alpha, beta, scale_grads=True):
    sums = scale_grads and is_column_scale(alpha, x.shape[-1])
    dalpha = alpha.new_empty(alpha.shape if sums else 0)
    return x.new_empty(x.shape), dalpha, torch.empty_like(dalpha)


def _setup_context(ctx, inputs, output):
    x, w_packed, alpha, beta, bias = inputs
    ctx.save_for_backward(x, w_packed, alpha, beta)
    ctx.bias_dtype = None if bias is None else bias.dtype


def row_scale_grads(total: Tensor, alpha: Tensor) -> Tensor:
    """[N] sums to the gradient of a row [N, 1] or single [1] scale."""
    return (total.reshape(alpha.shape) if alpha.dim() == 2 else total.sum().reshape(alpha.shape)).to(alpha.dtype)


def _backward(ctx, grad):
    x, w_packed, alpha, beta = ctx.saved_tensors
    need_x, _, need_alpha, need_beta, need_bias = needed_grads(ctx, 5)
    dx = dalpha = dbeta = dbias = None
    column = is_column_scale(alpha, x.shape[-1])
    if need_x or (column and (need_alpha or need_beta)):
        dx, dalpha, dbeta = torch.ops.bitkernels.packed_linear_backward(
            grad, x, w_packed, alpha, beta, need_alpha or need_beta
        )
    if not column:
        wide = alpha.dtype if alpha.dtype == torch.float64 else torch.float32
        tokens = tuple(range(grad.dim() - 1))
        if need_alpha:
            one = torch.ones(1, dtype=wide, device=x.device)
            product = torch.ops.bitkernels.packed_linear(x, w_packed, one, torch.zeros_like(one))
            dalpha = row_scale_grads((grad.to(wide) * product.to(wide)).sum(tokens), alpha)
        if need_beta:
            dbeta = row_scale_grads((grad.to(wide) * x.to(wide).sum(-1, keepdim=True)).sum(tokens), beta)
    if need_bias:
        dbias = grad.sum(tuple(range(grad.dim() - 1))).to(ctx.bias_dtype)
    return dx if need_x else None, None, dalpha if need_alpha else None, dbeta if need_beta else None, dbias


torch.library.register_autograd("bitkernels::packed_linear", _backward, setup_context=_setup_context)
