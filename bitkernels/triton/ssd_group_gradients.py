"""Gradients of B and C, which sum over the heads of a group; see ``ssd_scan_backward``.

What the states give of a block is a product for each head, ``dC = decay * (dy h)`` and ``dB = decay * dt * (x dh)``,
scaled afterwards, so that operands are not rounded again. What the pairs within the block give comes from the gradient
of C B^T, summed over heads before.
"""

import triton
import triton.language as tl

from bitkernels.triton.elementwise import silu
from bitkernels.triton.launch import Launch
from bitkernels.triton.ssd_states import (
    Chunks,
    Tile,
    block_span,
    columns,
    load_decays,
    load_segments,
    load_tile,
    pair_strides,
    precision_of,
    token_strides,
)

# Heads under way at once: a program does little but wait for them.
STAGES = 3


@triton.jit(do_not_specialize=["first_block", "splits", "pair_splits", "tokens", "T", "chunk_length"])
def group_gradients_kernel(
    p_dy,  # [B, T, H, P]
    p_x,  # [B, T, H, P]
    p_B,  # [B, T, G, N]
    p_C,  # [B, T, G, N]
    p_z,  # [B, T, H, P], gates dy, or None
    p_step,  # [blocks, H, BLOCK_T]
    p_total,  # [blocks, H, BLOCK_T]
    p_low,  # [blocks, H, BLOCK_T] or None
    p_seq_idx,  # [B, T] or None
    p_h,  # [blocks of the part, H, P, N]
    p_dh,  # [blocks of the part, H, P, N]
    p_dCB,  # [blocks of the part, G, pair_splits, BLOCK_T, BLOCK_T] float32, of (C B^T)^T
    p_dB,  # [splits, B, T, G, N]
    p_dC,  # [splits, B, T, G, N]
    p_cu_seqlens,
    p_sequence,
    p_first,
    first_block,
    splits,  # programs the heads of a group are spread over
    pair_splits,
    tokens,  # B * T
    H,
    T,
    chunk_length,
    stride_dy_b,
    stride_dy_t,
    stride_dy_h,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    stride_B_b,
    stride_B_t,
    stride_B_g,
    stride_C_b,
    stride_C_t,
    stride_C_g,
    stride_z_b,
    stride_z_t,
    stride_z_h,
    stride_seq_b,
    stride_seq_t,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_part = tl.program_id(0).to(tl.int64)
    of_C = tl.program_id(1) >= splits
    i_split = (tl.program_id(1) % splits).to(tl.int64)
    i_g = tl.program_id(2).to(tl.int64)
    i_block = first_block + i_part
    i_b, first, count = block_span(i_block, T, chunk_length, p_cu_seqlens, p_sequence, p_first, BLOCK_T)
    if count == 0:
        return
    o_i = tl.arange(0, BLOCK_T)
    m_t = o_i < count
    o_n, m_n = columns(0, N, BLOCK_N)
    m_out = m_t[:, None] & m_n[None, :]
    heads = tl.cdiv(HEADS_PER_GROUP, splits)
    begin = i_g * HEADS_PER_GROUP + i_split * heads
    end = tl.minimum(begin + heads, (i_g + 1) * HEADS_PER_GROUP)
    groups = H // HEADS_PER_GROUP
    p_dCB += (i_part * groups + i_g) * pair_splits * BLOCK_T * BLOCK_T
    if p_seq_idx is not None:
        segment = load_segments(p_seq_idx + i_b * stride_seq_b, stride_seq_t, first + o_i, m_t)
        last_segment = tl.max(segment, 0)

    gradient = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if of_C:
        p_dy += i_b * stride_dy_b + first * stride_dy_t
        if p_z is not None:
            p_z += i_b * stride_z_b + first * stride_z_t
        for i_h in range(begin, end):
            total, _, _ = load_decays(p_total, p_low, i_block * H + i_h, BLOCK_T)
            scale = tl.exp2(total)
            if p_seq_idx is not None:
                scale = tl.where(segment == 0, scale, 0.0)
            for i_p in range(0, (P + BLOCK_P - 1) // BLOCK_P):
                o_p, m_p = columns(i_p, P, BLOCK_P)
                b_dy = load_tile(p_dy + i_h * stride_dy_h, stride_dy_t, o_i, m_t, o_p, m_p)
                i_state = (i_part * H + i_h) * P * N
                o_state = o_p[:, None] * N + o_n[None, :]
                b_h = tl.load(p_h + i_state + o_state, mask=m_p[:, None] & m_n[None, :], other=0.0)
                if p_z is not None:
                    z = load_tile(p_z + i_h * stride_z_h, stride_z_t, o_i, m_t, o_p, m_p)
                    b_dy = (b_dy.to(tl.float32) * silu(z.to(tl.float32))).to(b_h.dtype)
                gradient += tl.dot(b_dy, b_h, input_precision=PRECISION) * scale[:, None]
        b_v = load_tile(p_B + i_b * stride_B_b + first * stride_B_t + i_g * stride_B_g, stride_B_t, o_i, m_t, o_n, m_n)
        o_pair = o_i[:, None] + o_i[None, :] * BLOCK_T
        p_out = p_dC
    else:
        p_x += i_b * stride_x_b + first * stride_x_t
        for i_h in range(begin, end):
            i_row = i_block * H + i_h
            _, _, to_end = load_decays(p_total, p_low, i_row, BLOCK_T)
            scale = tl.exp2(to_end) * tl.load(p_step + i_row * BLOCK_T + o_i)
            if p_seq_idx is not None:
                scale = tl.where(segment == last_segment, scale, 0.0)
            for i_p in range(0, (P + BLOCK_P - 1) // BLOCK_P):
                o_p, m_p = columns(i_p, P, BLOCK_P)
                b_x = load_tile(p_x + i_h * stride_x_h, stride_x_t, o_i, m_t, o_p, m_p)
                i_state = (i_part * H + i_h) * P * N
                o_state = o_p[:, None] * N + o_n[None, :]
                b_dh = tl.load(p_dh + i_state + o_state, mask=m_p[:, None] & m_n[None, :], other=0.0)
                gradient += tl.dot(b_x, b_dh, input_precision=PRECISION) * scale[:, None]
        b_v = load_tile(p_C + i_b * stride_C_b + first * stride_C_t + i_g * stride_C_g, stride_C_t, o_i, m_t, o_n, m_n)
        o_pair = o_i[:, None] * BLOCK_T + o_i[None, :]
        p_out = p_dB

    if i_split == 0:
        dCB = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for i_sum in range(0, pair_splits):
            dCB += tl.load(p_dCB + i_sum * BLOCK_T * BLOCK_T + o_pair)
        gradient = tl.dot(dCB.to(b_v.dtype), b_v, gradient, input_precision=PRECISION)
    o_row = i_split * tokens + i_b * T + first + o_i
    o_out = (o_row[:, None] * groups + i_g) * N + o_n[None, :]
    tl.store(p_out + o_out, gradient.to(p_out.dtype.element_ty), mask=m_out)


def plan_group_gradients(
    dy, x, B, C, z, seq_idx, chunks: Chunks, tile: Tile, blocks: int, splits: int, pair_splits: int
) -> Launch:
    """Plans ``group_gradients_kernel`` for a number of blocks; call: its pointers, and the first block."""
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    return Launch(
        group_gradients_kernel, (blocks, 2 * splits, G), splits, pair_splits, batch * T, H, chunks.T, chunks.length,
        *token_strides(dy, x, B, C, z), *pair_strides(seq_idx), P, N, H // G, tile.time, tile.headdim, tile.state,
        precision_of(x.dtype), num_warps=tile.warps, num_stages=STAGES,
    )  # fmt: skip
