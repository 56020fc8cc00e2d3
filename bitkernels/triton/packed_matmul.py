"""The matrix product behind every packed operator: floating-point or int8 rows times decoded weights.

One product serves forward (the packed index is summed) and backward (``transposed``: the rows of the
packed matrix are summed). In both, R is the summed index and J the index of the output:
``y[M, J] = x[M, R] @ W~[R, J]``. Scales that follow R are multiplied into x by ``prepare`` beforehand, scales
that follow J are applied to the finished sum. docs/format.md defines the packed words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SIGN_BITS = 1
TERNARY_BITS = 2

# Up to this many rows a reduction over words beats matrix units of which one row in 16 would be used.
GEMV_MAX_ROWS = 2


@triton.jit
def decode(words, shift, BITS: tl.constexpr, INTEGER: tl.constexpr):
    """Packed words to the values of one code each: {0, 1} is -1, +1 and {0, 1, 2} is -1, 0, +1."""
    code = (words >> shift) & ((1 << BITS) - 1)
    if INTEGER:
        value = 2 * code - 1 if BITS == 1 else code - 1
    elif BITS == 1:  # selecting constants is cheaper than converting integers
        value = tl.where(code == 1, 1.0, -1.0)
    else:
        value = tl.where(code == 1, 0.0, tl.where(code == 0, -1.0, 1.0))
    return value


@triton.jit
def _power_of_two(biased_exponent):
    return (biased_exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def prepare_kernel(
    p_x,  # [M, R]
    p_alpha,  # [R] float32, or None
    p_beta,  # [R] float32, or None: all one
    p_hi,  # [M, WIDTH] alpha * x, or None; [M, LANES, WIDTH / LANES] where LANES > 1
    p_lo,  # like p_hi: what p_hi's type could not hold, or None
    p_unit,  # [M] float32: the power of two each row was divided by, or None
    p_sum,  # [M] float32: sum of beta * x
    R,
    WIDTH,  # R rounded up to whole words where LANES > 1
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    unit = 1.0
    if p_unit is not None:
        # 16-bit floats hold a row exactly enough once its largest value is brought to [2^14, 2^15).
        b_max = tl.zeros([BLOCK], tl.float32)
        for start in range(0, R, BLOCK):
            o_r = start + tl.arange(0, BLOCK)
            b_x = tl.load(p_x + i_m * R + o_r, mask=o_r < R, other=0.0).to(tl.float32)
            b_max = tl.maximum(b_max, tl.abs(b_x * tl.load(p_alpha + o_r, mask=o_r < R, other=0.0)))
        exponent = (tl.max(b_max, 0).to(tl.int32, bitcast=True) >> 23) & 0xFF
        exponent = tl.minimum(tl.maximum(exponent, 15), 254)
        unit = _power_of_two(268 - exponent)
        tl.store(p_unit + i_m, _power_of_two(exponent - 14))

    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        o_r = start + tl.arange(0, BLOCK)
        m_r = o_r < R
        b_x = tl.load(p_x + i_m * R + o_r, mask=m_r, other=0.0).to(tl.float32)
        if p_beta is None:
            b_sum += b_x
        else:
            b_sum += b_x * tl.load(p_beta + o_r, mask=m_r, other=0.0)
        if p_hi is not None:
            if p_alpha is not None:
                b_x *= tl.load(p_alpha + o_r, mask=m_r, other=0.0)
            b_x *= unit
            o_out = (o_r % LANES) * (WIDTH // LANES) + o_r // LANES
            b_hi = b_x.to(p_hi.dtype.element_ty)
            tl.store(p_hi + i_m * WIDTH + o_out, b_hi, mask=o_r < WIDTH)
            if p_lo is not None:
                b_lo = (b_x - b_hi.to(tl.float32)).to(p_lo.dtype.element_ty)
                tl.store(p_lo + i_m * WIDTH + o_out, b_lo, mask=o_r < WIDTH)
    tl.store(p_sum + i_m, tl.sum(b_sum, 0))


@triton.jit
def _finish(
    acc,  # [BM, BJ] sums
    b_sum,  # [BM] or None
    o_m, o_j, m_m, m_j,
    p_unit,  # [M] or None
    p_alpha,  # [J] with stride_scale, or None
    p_beta,  # as p_alpha
    p_bias,  # [J] or None
    stride_scale,  # 0 where one scale serves every column
):  # fmt: skip
    """``acc * unit[m] * alpha[j] + beta[j] * sum[m] + bias[j]``, whatever of these is given."""
    y = acc.to(tl.float32)
    if p_unit is not None:
        y *= tl.load(p_unit + o_m, mask=m_m, other=0.0)[:, None]
    if p_alpha is not None:
        y *= tl.load(p_alpha + o_j * stride_scale, mask=m_j, other=0.0)[None, :]
    if b_sum is not None:
        if p_beta is not None:
            y += tl.load(p_beta + o_j * stride_scale, mask=m_j, other=0.0)[None, :] * b_sum[:, None]
        else:
            y += b_sum[:, None]
    if p_bias is not None:
        y += tl.load(p_bias + o_j, mask=m_j, other=0.0)[None, :]
    return y


@triton.jit
def matmul_kernel(
    p_x,  # [M, R]
    p_lo,  # [M, R] a second part of x, or None
    p_w,  # int32: [J, words] packed along R, or [R, words] packed along J where TRANSPOSED
    p_unit,  # [M] float32 or None
    p_sum,  # [M] float32 or None
    p_alpha,  # [J] or [1] float32, or None
    p_beta,  # as p_alpha
    p_bias,  # [J] float32 or None
    p_y,  # [M, J]
    p_gx,  # [M, J] the input whose scales want gradients, or None
    p_dalpha,  # [ceil(M / BM), J] float32 partial sums of gx * acc, or None
    p_dbeta,  # [ceil(M / BM), J] float32 partial sums of gx * sum, or None
    M, J, R, words,
    stride_scale,
    BITS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    # Neighbours share rows of x: the packed weight is the operand that stays in cache.
    j_blocks = tl.cdiv(J, BJ)
    i_m = (tl.program_id(0) // j_blocks).to(tl.int64)
    i_j = (tl.program_id(0) % j_blocks).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_j = i_j * BJ + tl.arange(0, BJ)
    m_m = o_m < M
    m_j = o_j < J
    LANES: tl.constexpr = 32 // BITS
    INTEGER: tl.constexpr = p_x.dtype.element_ty == tl.int8
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32
    lane_shift = tl.arange(0, LANES) * BITS
    # Tiles begin at 64-bit addresses and span less than 2^31 elements (arguments.MAX_SIZE): registers are scarce.
    p_x += i_m * BM * R
    o_x = tl.arange(0, BM)[:, None] * R + tl.arange(0, BR)[None, :]
    if TRANSPOSED:
        p_w += i_j * (BJ // LANES)
        m_c = i_j * (BJ // LANES) + tl.arange(0, BJ // LANES) < words
        o_w = tl.arange(0, BR)[:, None] * words + tl.arange(0, BJ // LANES)[None, :]
    else:
        p_w += i_j * BJ * words
        o_w = tl.arange(0, BJ)[:, None] * words + tl.arange(0, BR // LANES)[None, :]

    acc = tl.zeros([BM, BJ], ACC)
    for start in range(0, R, BR):
        m_r = start + tl.arange(0, BR) < R
        if TRANSPOSED:
            # [BR, BJ / LANES] words, expanded along J
            b_w = tl.load(p_w + o_w, mask=m_r[:, None] & m_c[None, :], other=0)
            p_w += BR * tl.cast(words, tl.int64)
            b_s = tl.reshape(decode(b_w[:, :, None], lane_shift[None, None, :], BITS, INTEGER), [BR, BJ])
        else:
            # [BJ, BR / LANES] words, expanded along R
            m_c = start // LANES + tl.arange(0, BR // LANES) < words
            b_w = tl.load(p_w + o_w, mask=m_j[:, None] & m_c[None, :], other=0)
            p_w += BR // LANES
            b_s = tl.trans(tl.reshape(decode(b_w[:, :, None], lane_shift[None, None, :], BITS, INTEGER), [BJ, BR]))
        b_s = b_s.to(p_x.dtype.element_ty)
        # Masked values of x make what was decoded beyond R irrelevant.
        m_x = m_m[:, None] & m_r[None, :]
        b_x = tl.load(p_x + o_x, mask=m_x, other=0)
        p_x += BR
        acc = tl.dot(b_x, b_s, acc, input_precision="ieee", out_dtype=ACC)
        if p_lo is not None:
            b_lo = tl.load(p_lo + i_m * BM * R + start + o_x, mask=m_x, other=0)
            acc = tl.dot(b_lo, b_s, acc, input_precision="ieee", out_dtype=ACC)

    b_sum = None
    if p_sum is not None:
        b_sum = tl.load(p_sum + o_m, mask=m_m, other=0.0)
    y = _finish(acc, b_sum, o_m, o_j, m_m, m_j, p_unit, p_alpha, p_beta, p_bias, stride_scale)
    o_tile = i_m * BM * J + i_j * BJ
    o_y = tl.arange(0, BM)[:, None] * J + tl.arange(0, BJ)[None, :]
    m_y = m_m[:, None] & m_j[None, :]
    tl.store(p_y + o_tile + o_y, y.to(p_y.dtype.element_ty), mask=m_y)
    if p_gx is not None:
        b_gx = tl.load(p_gx + o_tile + o_y, mask=m_y, other=0.0).to(tl.float32)
        o_g = i_m * J + o_j
        tl.store(p_dalpha + o_g, tl.sum(b_gx * acc, 0), mask=m_j)
        tl.store(p_dbeta + o_g, tl.sum(b_gx * b_sum[:, None], 0), mask=m_j)


@triton.jit
def gemv_kernel(
    p_x,  # [M, LANES, words]: lane l of word c is x[c * LANES + l], zero beyond R
    p_w,  # int32 [J, words]
    p_unit,  # [M] float32 or None
    p_sum,  # [M] float32 or None
    p_alpha,  # [J] or [1] float32, or None
    p_beta,  # as p_alpha
    p_bias,  # [J] float32 or None
    p_y,  # [M, J]
    J,
    words,
    stride_scale,
    BITS: tl.constexpr,
    BJ: tl.constexpr,
    BW: tl.constexpr,
):
    o_m = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    o_j = tl.program_id(0).to(tl.int64) * BJ + tl.arange(0, BJ)
    m_j = o_j < J
    LANES: tl.constexpr = 32 // BITS
    INTEGER: tl.constexpr = p_x.dtype.element_ty == tl.int8
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32

    p_x += tl.program_id(1).to(tl.int64) * LANES * words
    b_acc = tl.zeros([BJ, BW], ACC)
    for start in range(0, words, BW):
        o_c = start + tl.arange(0, BW)
        m_c = o_c < words
        b_w = tl.load(p_w + o_j[:, None] * words + o_c[None, :], mask=m_j[:, None] & m_c[None, :], other=0)
        for lane in tl.static_range(LANES):
            b_x = tl.load(p_x + lane * words + o_c, mask=m_c, other=0).to(ACC)
            b_acc += decode(b_w, lane * BITS, BITS, INTEGER).to(ACC) * b_x[None, :]
    acc = tl.sum(b_acc, 1)[None, :]

    b_sum = None
    if p_sum is not None:
        b_sum = tl.load(p_sum + o_m)
    y = _finish(acc, b_sum, o_m, o_j, o_m >= 0, m_j, p_unit, p_alpha, p_beta, p_bias, stride_scale)
    tl.store(p_y + o_m[:, None] * J + o_j[None, :], y.to(p_y.dtype.element_ty), mask=m_j[None, :])


@triton.jit
def column_sums_kernel(
    p_partial,  # [blocks, J] float32
    p_out,  # [J]
    blocks,
    J,
    BLOCK: tl.constexpr,
):
    o_j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_j = o_j < J
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(blocks):
        b_sum += tl.load(p_partial + tl.cast(i, tl.int64) * J + o_j, mask=m_j, other=0.0)
    tl.store(p_out + o_j, b_sum.to(p_out.dtype.element_ty), mask=m_j)


def tile(M: int, dtype: torch.dtype) -> dict:
    """Tile and launch options of matmul_kernel."""
    if dtype == torch.float32:  # no matrix units: small tiles, no deep pipeline
        return {"BM": 16 if M <= 16 else 32, "BJ": 64, "BR": 32, "num_warps": 4, "num_stages": 2}
    if M <= 16:
        return {"BM": 16, "BJ": 32, "BR": 128, "num_warps": 4, "num_stages": 3}
    if M <= 64:
        return {"BM": 64, "BJ": 64, "BR": 64, "num_warps": 4, "num_stages": 3}
    return {"BM": 128, "BJ": 64, "BR": 64, "num_warps": 8, "num_stages": 3}


def explain(M: int, dtype: torch.dtype) -> str:
    """What ``matmul`` and ``gemv`` do with M rows, as text."""
    if M <= GEMV_MAX_ROWS:
        return "Triton gemv: a program for each row of activations and block of rows of the weights"
    options = tile(M, dtype)
    return (
        f"Triton matmul: tiles of {options['BJ']} rows times {options['BM']} tokens, {options['BR']} columns at a time"
    )


def row_block(width: int) -> dict:
    """Block and launch options of a kernel in which one program walks one row."""
    block = min(4096, max(32, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


def prepare(
    x: Tensor, alpha: Tensor | None, beta: Tensor | None, lanes: int | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """alpha * x and sum(beta * x) for x [M, R], in the order of gemv_kernel (lanes > 1), of matmul_kernel
    (lanes = 1), or the sum alone (lanes = None).

    Returns hi, lo, unit and sum: ``alpha * x = unit * (hi + lo)``. Rounding the product to x's own 16-bit
    type could be a worse approximation than rounding the weights would be, so matmul_kernel gets it in fp16
    (three bits more than bf16) after scaling the row to its range, and in two parts where x is fp16 itself.
    """
    M, R = x.shape
    hi = lo = unit = None
    width = R
    if lanes is not None and lanes > 1:
        width = triton.cdiv(R, lanes) * lanes
        hi = x.new_empty(M, width, dtype=torch.float32)
    elif lanes == 1 and x.dtype == torch.float32:
        hi = torch.empty_like(x)
    elif lanes == 1:
        hi = torch.empty_like(x, dtype=torch.float16)
        lo = torch.empty_like(hi) if x.dtype == torch.float16 else None
        unit = x.new_empty(M, dtype=torch.float32)
    total = x.new_empty(M, dtype=torch.float32)
    prepare_kernel[(M,)](x, alpha, beta, hi, lo, unit, total, R, width, LANES=lanes or 1, **row_block(width))
    return hi, lo, unit, total


def matmul(
    x: Tensor,  # [M, R] float or int8
    w: Tensor,  # int32 words
    y: Tensor,  # [M, J]
    bits: int,
    *,
    lo: Tensor | None = None,
    unit: Tensor | None = None,
    total: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    transposed: bool = False,
    scales_of: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Launches matmul_kernel. With ``scales_of`` (the layer's input) returns the gradients of column scales."""
    (M, R), J = x.shape, y.shape[1]
    options = tile(M, x.dtype)
    m_blocks = triton.cdiv(M, options["BM"])
    partial = y.new_empty(2, m_blocks, J, dtype=torch.float32) if scales_of is not None else (None, None)
    matmul_kernel[(m_blocks * triton.cdiv(J, options["BJ"]),)](
        x, lo, w, unit, total, alpha, beta, bias, y, scales_of, partial[0], partial[1],
        M, J, R, w.shape[1], 0 if alpha is None or alpha.numel() == 1 else 1,
        BITS=bits, TRANSPOSED=transposed, enable_fp_fusion=x.dtype != torch.int8, **options,
    )  # fmt: skip
    if scales_of is None:
        return None
    sums = y.new_empty(2, J, dtype=torch.float32)
    for i in range(2):
        column_sums_kernel[(triton.cdiv(J, 128),)](partial[i], sums[i], m_blocks, J, BLOCK=128)
    return sums[0], sums[1]


def gemv(
    x: Tensor,  # [M, words * LANES] by lanes
    w: Tensor,  # int32 [J, words]
    y: Tensor,  # [M, J]
    bits: int,
    *,
    unit: Tensor | None = None,
    total: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Launches gemv_kernel."""
    M, J = y.shape
    BJ = 16
    gemv_kernel[(triton.cdiv(J, BJ), M)](
        x, w, unit, total, alpha, beta, bias, y, J, w.shape[1], 0 if alpha is None or alpha.numel() == 1 else 1,
        BITS=bits, BJ=BJ, BW=32, enable_fp_fusion=x.dtype != torch.int8, num_warps=4,
    )  # fmt: skip
