"""``sign_linear_weight_backward`` in Triton: one pass over the product G = dY^T X."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.arguments import check, check_float, check_packed, check_scale, vector, words_of

_ROWS, _COLUMNS = 32, 128  # a program's


@triton.jit
def weight_gradient_kernel(
    p_product,  # [N, K]
    p_w,  # int32 [N, words]
    p_alpha,  # float32, by the strides
    p_dweight,  # [N, K] or None
    p_signed,  # float32 [blocks of rows, K], or [blocks of columns, N] for scales of rows; or None
    p_plain,  # as p_signed
    N,
    K,
    words,
    stride_n,
    stride_k,
    COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_row, i_column = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_n = i_row * ROWS + tl.arange(0, ROWS)
    o_k = i_column * COLUMNS + tl.arange(0, COLUMNS)
    m_g = (o_n < N)[:, None] & (o_k < K)[None, :]
    b_g = tl.load(p_product + o_n[:, None] * K + o_k[None, :], mask=m_g, other=0.0).to(tl.float32)
    if p_dweight is not None:
        p_a = p_alpha + o_n[:, None] * stride_n + o_k[None, :] * stride_k
        b_dw = b_g * tl.load(p_a, mask=m_g, other=0.0)
        tl.store(p_dweight + o_n[:, None] * K + o_k[None, :], b_dw.to(p_dweight.dtype.element_ty), mask=m_g)
    if p_signed is not None:
        b_w = tl.load(p_w + o_n[:, None] * words + (o_k // 32)[None, :], mask=m_g, other=0)
        b_s = tl.where((b_w >> (o_k % 32)[None, :].to(tl.int32)) & 1 != 0, b_g, -b_g)
        if COLUMN:
            tl.store(p_signed + i_row * K + o_k, tl.sum(b_s, 0), mask=o_k < K)
            tl.store(p_plain + i_row * K + o_k, tl.sum(b_g, 0), mask=o_k < K)
        else:
            tl.store(p_signed + i_column * N + o_n, tl.sum(b_s, 1), mask=o_n < N)
            tl.store(p_plain + i_column * N + o_n, tl.sum(b_g, 1), mask=o_n < N)


def sign_linear_weight_backward(
    product: Tensor,
    w_packed: Tensor,
    alpha: Tensor,
    weight_dtype: torch.dtype,
    need_weight: bool = True,
    need_scales: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "sign_linear_weight_backward"
    check_float(op, "product", product)
    check(product.dim() == 2, op, f"product must be [N, K], got {list(product.shape)}")
    N, K = product.shape
    check_packed(op, w_packed, K, 32)
    check(w_packed.shape[0] == N, op, f"w_packed must have N = {N} rows, got {w_packed.shape[0]}")
    check_scale(op, "alpha", alpha, product)
    from bitkernels.packed_linear import is_column_scale  # which loads the operators, and they this module

    column, row = is_column_scale(alpha, K), alpha.shape == (N, 1)
    check(column or row or alpha.numel() == 1, op, f"alpha does not fit N = {N} and K = {K}: {list(alpha.shape)}")
    blocks = triton.cdiv(N, _ROWS), triton.cdiv(K, _COLUMNS)
    dweight = product.new_empty((N, K) if need_weight else 0, dtype=weight_dtype)
    check_float(op, "weight_dtype", dweight)
    partial = (blocks[0], K) if column else (blocks[1], N)
    signed, plain = product.new_zeros(2, *(partial if need_scales else (0, 0)), dtype=torch.float32).unbind()
    if product.numel():
        weight_gradient_kernel[blocks](
            product.contiguous(),
            words_of(w_packed),
            vector(alpha),
            dweight if need_weight else None,
            signed if need_scales else None,
            plain if need_scales else None,
            N,
            K,
            w_packed.shape[1],
            int(row and not column),
            int(column),
            COLUMN=column,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return dweight, signed.sum(0), plain.sum(0)
