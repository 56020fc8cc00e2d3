"""packed_linear and its backward in Triton, for any GPU that Triton compiles for.

Column scales follow the summed index in the forward and the output index in the backward, row scales the
other way round, and a single scale can be applied to the finished sum in both.
"""

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
from bitkernels.triton.packed_matmul import GEMV_MAX_ROWS, SIGN_BITS, explain, gemv, matmul, prepare


def _scale_axis(op: str, alpha: Tensor, N: int, K: int) -> str:
    shape = tuple(alpha.shape)
    if shape in ((K,), (1, K)):
        return "column"
    if shape == (N, 1):
        return "row"
    if alpha.dim() <= 1 and alpha.numel() == 1:
        return "single"
    raise ValueError(
        f"{op}: alpha must be of shape [{K}] or [1, {K}] (column), [{N}, 1] (row) or [1] (single), got {list(shape)}"
    )


def _check(op: str, x: Tensor, w_packed: Tensor, alpha: Tensor, beta: Tensor) -> str:
    check_float(op, "x", x)
    check(x.dim() >= 1, op, "x must have at least one dimension")
    check_device(op, "w_packed", w_packed, x)
    check_scale(op, "alpha", alpha, x)
    check_scale(op, "beta", beta, x)
    check_packed(op, w_packed, x.shape[-1], 32)
    axis = _scale_axis(op, alpha, w_packed.shape[0], x.shape[-1])
    check_shape(op, "beta", beta, tuple(alpha.shape))
    return axis


def packed_linear(x: Tensor, w_packed: Tensor, alpha: Tensor, beta: Tensor, bias: Tensor | None = None) -> Tensor:
    op = "packed_linear"
    axis = _check(op, x, w_packed, alpha, beta)
    N = w_packed.shape[0]
    if bias is not None:
        check_scale(op, "bias", bias, x)
        check_shape(op, "bias", bias, (N,))
        bias = vector(bias)
    y = x.new_empty(*x.shape[:-1], N)
    if y.numel() == 0:
        return y
    rows, out, w = rows_of(x), y.view(-1, N), words_of(w_packed)
    alpha, beta = vector(alpha), vector(beta)
    inner = (alpha, beta) if axis == "column" else (None, None)
    outer = {"bias": bias} if axis == "column" else {"alpha": alpha, "beta": beta, "bias": bias}
    if rows.shape[0] <= GEMV_MAX_ROWS:
        hi, _, unit, total = prepare(rows, *inner, lanes=32)
        gemv(hi, w, out, SIGN_BITS, unit=unit, total=total, **outer)
    elif axis == "column":
        hi, lo, unit, total = prepare(rows, *inner, lanes=1)
        matmul(hi, w, out, SIGN_BITS, lo=lo, unit=unit, total=total, **outer)
    else:
        total = prepare(rows, *inner, lanes=None)[3]
        matmul(rows, w, out, SIGN_BITS, total=total, **outer)
    return y


def packed_linear_backward(
    grad: Tensor, x: Tensor, w_packed: Tensor, alpha: Tensor, beta: Tensor, scale_grads: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    op = "packed_linear_backward"
    axis = _check(op, x, w_packed, alpha, beta)
    N, K = w_packed.shape[0], x.shape[-1]
    check(grad.dtype == x.dtype, op, f"grad must be {x.dtype} as x is, got {grad.dtype}")
    check_device(op, "grad", grad, x)
    check_shape(op, "grad", grad, (*x.shape[:-1], N))
    sums_wanted = scale_grads and axis == "column"
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        empty = alpha.shape if sums_wanted else (0,)
        return dx, alpha.new_zeros(empty), alpha.new_zeros(empty)

    rows, out, w = rows_of(grad), dx.view(-1, K), words_of(w_packed)
    a, b = vector(alpha), vector(beta)
    if axis == "row":
        hi, lo, unit, total = prepare(rows, a, b, lanes=1)
        matmul(hi, w, out, SIGN_BITS, lo=lo, unit=unit, total=total, transposed=True)
    else:
        total = prepare(rows, None, None, lanes=None)[3]
        sums = matmul(
            rows, w, out, SIGN_BITS, total=total, alpha=a, beta=b, transposed=True,
            scales_of=rows_of(x) if sums_wanted else None,
        )  # fmt: skip
        if sums_wanted:
            return dx, *(s.view(alpha.shape).to(alpha.dtype) for s in sums)
    return dx, alpha.new_empty(0), alpha.new_empty(0)


def explain_packed_linear(like: Tensor, M: int, N: int, K: int, scales: str) -> str:
    return explain(M, like.dtype)
