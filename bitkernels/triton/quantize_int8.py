"""Per-token int8 quantisation in Triton, bit for bit as the reference computes it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.arguments import check, check_float, rows_of
from bitkernels.triton.packed_matmul import row_block

# 1.5 * 2^23: float32 values around it are the integers, so adding and subtracting it rounds half to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def quantize_int8_kernel(
    p_x,  # [M, K]
    p_q,  # int8 [M, WIDTH]; [M, LANES, WIDTH / LANES] where LANES > 1, zero beyond K
    p_scale,  # [M] float32
    K,
    WIDTH,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    b_max = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        o_k = start + tl.arange(0, BLOCK)
        b_max = tl.maximum(b_max, tl.abs(tl.load(p_x + i_m * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)))
    b_scale = tl.div_rn(127.0, tl.maximum(tl.max(b_max, 0), 1e-5))
    tl.store(p_scale + i_m, b_scale)
    for start in range(0, WIDTH, BLOCK):
        o_k = start + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + i_m * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_q = (b_x * b_scale + _ROUND) - _ROUND
        b_q = tl.minimum(tl.maximum(b_q, -128.0), 127.0).to(tl.int8)
        o_out = (o_k % LANES) * (WIDTH // LANES) + o_k // LANES
        tl.store(p_q + i_m * WIDTH + o_out, b_q, mask=o_k < WIDTH)


def quantize_rows(x: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
    """x [M, K] contiguous -> q int8 and scale [M]; q in the order of gemv_kernel where lanes > 1."""
    M, K = x.shape
    width = triton.cdiv(K, lanes) * lanes
    q = x.new_empty(M, width, dtype=torch.int8)
    scale = x.new_empty(M, dtype=torch.float32)
    # Without contraction: a fused multiply-add would round x * scale once instead of twice.
    quantize_int8_kernel[(M,)](x, q, scale, K, width, LANES=lanes, enable_fp_fusion=False, **row_block(width))
    return q, scale


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """As the operator: q int8 [..., K] and scale float32 [...]."""
    op = "quantize_int8"
    check_float(op, "x", x)
    check(x.dim() >= 1, op, "x must have at least one dimension")
    rows = rows_of(x)
    if rows.shape[0] == 0:
        return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    q, scale = quantize_rows(rows, lanes=1)
    return q.view(x.shape), scale.view(x.shape[:-1])


def fake_quantize_int8(x: Tensor) -> Tensor:
    """As the operator: q / scale in x's dtype."""
    op = "fake_quantize_int8"
    check_float(op, "x", x)
    check(x.dim() >= 1, op, "x must have at least one dimension")
    q, scale = quantize_int8(x)
    return (q.float() / scale.unsqueeze(-1)).to(x.dtype)
