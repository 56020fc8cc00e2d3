"""ternary_linear and its backward in Triton: floating-point activations, or int8 with an exact integer sum."""

import torch
from torch import Tensor

from bitkernels.triton.arguments import (
    check,
    check_device,
    check_float,
    check_packed,
    check_scale,
    check_shape,
    rows_of,
    vector,
    words_of,
)
from bitkernels.triton.packed_matmul import GEMV_MAX_ROWS, TERNARY_BITS, explain, gemv, matmul, prepare
from bitkernels.triton.quantize_int8 import quantize_rows


def _check(op: str, argument: str, x: Tensor, w_packed: Tensor, scale: Tensor) -> None:
    check_float(op, argument, x)
    check(x.dim() >= 1, op, f"{argument} must have at least one dimension")
    check_device(op, "w_packed", w_packed, x)
    check_scale(op, "scale", scale, x)
    check(scale.numel() == 1, op, f"scale must be of shape [1], got {list(scale.shape)}")


def ternary_linear(
    x: Tensor, w_packed: Tensor, scale: Tensor, bias: Tensor | None = None, act_bits: int | None = None
) -> Tensor:
    op = "ternary_linear"
    _check(op, "x", x, w_packed, scale)
    check_packed(op, w_packed, x.shape[-1], 16)
    check(act_bits in (None, 8), op, f"act_bits must be None or 8, got {act_bits}")
    N = w_packed.shape[0]
    if bias is not None:
        check_scale(op, "bias", bias, x)
        check_shape(op, "bias", bias, (N,))
        bias = vector(bias)
    y = x.new_empty(*x.shape[:-1], N)
    if y.numel() == 0:
        return y
    rows = rows_of(x)
    out, w, scale = y.view(-1, N), words_of(w_packed), vector(scale)
    narrow = rows.shape[0] <= GEMV_MAX_ROWS
    lanes = 16 if narrow else 1
    if act_bits == 8:
        q, act_scale = quantize_rows(rows, lanes)
        scales = {"unit": scale / act_scale, "bias": bias}
    else:
        q = prepare(rows, None, None, lanes)[0] if narrow else rows
        scales = {"alpha": scale, "bias": bias}
    (gemv if narrow else matmul)(q, w, out, TERNARY_BITS, **scales)
    return y


def ternary_linear_backward(grad: Tensor, w_packed: Tensor, scale: Tensor, K: int) -> Tensor:
    op = "ternary_linear_backward"
    _check(op, "grad", grad, w_packed, scale)
    check_packed(op, w_packed, K, 16)
    N = w_packed.shape[0]
    check(grad.shape[-1] == N, op, f"grad must have N = {N} columns, got {grad.shape[-1]}")
    dx = grad.new_empty(*grad.shape[:-1], K)
    if dx.numel():
        rows = rows_of(grad)
        matmul(rows, words_of(w_packed), dx.view(-1, K), TERNARY_BITS, alpha=vector(scale), transposed=True)
    return dx


def explain_ternary_linear(like: Tensor, M: int, N: int, K: int, act_bits: int | None = None) -> str:
    return explain(M, torch.int8 if act_bits == 8 else like.dtype)
