"""Gradients of the SSD scan.

With h the state before a block and dh the gradient of the state after it, all gradients of a block follow without any
other block. So two walks leave h and dh of every block in memory (in the type of x, as operands of products), and one
kernel does the rest, all blocks in parallel. A program of it takes one block and several heads of one group: C B^T is
computed once, and the gradients of B and C, which sum over heads, stay in registers; what several programs add is
summed from their parts afterwards, in a fixed order.

The gradient of the decay between tokens k - 1 and k is the sum of all that crosses it, taken directly: differences of
running sums would lose the small gradients of strong decays.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.elementwise import silu, silu_gradient, step_options, step_size
from bitkernels.triton.mixer_arguments import check_floating, check_like, check_scan
from bitkernels.triton.ssd_states import (
    Tile,
    block_span,
    divide,
    enter_chunks,
    last_of,
    load_segments,
    load_steps,
    load_tile,
    pair_decay,
    precision_of,
    prepare,
    segments_within,
    strides_of,
    walk_states,
)

# Programs worth having before one takes several heads.
MIN_PROGRAMS = 512


def backward_tile(dtype: torch.dtype, P: int, N: int) -> Tile:
    """Registers hold float32 gradients of B and C [time, state] and products [time, time]."""
    state = max(16, triton.next_power_of_2(N))
    headdim = max(16, triton.next_power_of_2(P))
    if dtype == torch.float32:
        return Tile(16, min(headdim, 32), state, 8 if state <= 128 else 16)
    if state <= 128:
        return Tile(64, min(headdim, 32), state, 8)
    return Tile(32, min(headdim, 64), state, 8)


@triton.jit
def load_dt(p_dt, stride_t, o_t, m_t, p_dt_bias, i_h):
    """[BLOCK_T] dt + bias of one head."""
    v = tl.load(p_dt + o_t * stride_t, mask=m_t, other=0.0).to(tl.float32)
    if p_dt_bias is not None:
        v += tl.load(p_dt_bias + i_h).to(tl.float32)
    return v


@triton.jit(do_not_specialize=["T", "chunk_length"])
def ssd_scan_backward_kernel(
    p_dy,  # [B, T, H, P]
    p_x,  # [B, T, H, P]
    p_B,  # [B, T, G, N]
    p_C,  # [B, T, G, N]
    p_D,  # [H] or [H, P] by strides, or None
    p_z,  # [B, T, H, P] or None
    p_dt,  # [B, T, H]
    p_A,  # [H]
    p_dt_bias,  # [H] or None
    p_step,  # [B, H, T]
    p_total,  # [B, H, T]
    p_low,  # [B, H, T] or None
    p_seq_idx,  # [B, T] or None
    p_h,  # [blocks, H, P, N] the state before each block
    p_dh,  # [blocks, H, P, N] the gradient of the state after it
    p_dx,  # [B, T, H, P] contiguous
    p_dz,  # [B, T, H, P] contiguous, or None
    p_ddt,  # [B, T, H] contiguous
    p_dB,  # [SPLITS, B, T, G, N] float32
    p_dC,  # [SPLITS, B, T, G, N] float32
    p_dA,  # [blocks, H] float32
    p_ddt_bias,  # [blocks, H] float32, or None
    p_dD,  # [blocks, H, P] float32, or None
    tokens,  # B * T
    H,
    P,
    N,
    T,
    chunk_length,
    p_cu_seqlens,
    p_sequence,
    p_first,
    stride_dy_b,
    stride_dy_t,
    stride_dy_h,
    stride_dy_p,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    stride_x_p,
    stride_B_b,
    stride_B_t,
    stride_B_g,
    stride_B_n,
    stride_C_b,
    stride_C_t,
    stride_C_g,
    stride_C_n,
    stride_z_b,
    stride_z_t,
    stride_z_h,
    stride_z_p,
    stride_D_h,
    stride_D_p,
    stride_dt_b,
    stride_dt_t,
    stride_dt_h,
    stride_seq_b,
    stride_seq_t,
    dt_min,
    dt_max,
    HEADS_PER_GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_block = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1).to(tl.int64)
    i_g = tl.program_id(2).to(tl.int64)
    i_b, o_t, m_t = block_span(i_block, T, chunk_length, p_cu_seqlens, p_sequence, p_first, BLOCK_T)
    count = tl.sum(m_t.to(tl.int32), 0)
    if count == 0:  # past the end of its chunk, where the walks left nothing
        return
    o_i = tl.arange(0, BLOCK_T)
    first = tl.min(o_t, 0)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N

    p_B += i_b * stride_B_b + i_g * stride_B_g
    p_C += i_b * stride_C_b + i_g * stride_C_g
    b_B = load_tile(p_B, o_t, stride_B_t, m_t, o_n, stride_B_n, m_n).to(p_x.dtype.element_ty)
    b_C = load_tile(p_C, o_t, stride_C_t, m_t, o_n, stride_C_n, m_n).to(p_x.dtype.element_ty)
    CB = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)  # [i, j]
    reaches = o_i[:, None] >= o_i[None, :]
    if p_seq_idx is not None:
        segment = load_segments(p_seq_idx + i_b * stride_seq_b, stride_seq_t, o_t, m_t)
        last_segment = last_of(segment, BLOCK_T)
        reaches = reaches & (segment[:, None] == segment[None, :])
    at_or_after = (o_i[:, None] <= o_i[None, :]).to(tl.float32)  # [k, i]

    dCB = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    dB = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    dC = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    heads = tl.cdiv(HEADS_PER_GROUP, SPLITS)
    for i_head in range(i_split * heads, tl.minimum(i_split * heads + heads, HEADS_PER_GROUP)):
        i_h = i_g * HEADS_PER_GROUP + i_head
        o_steps = (i_b * H + i_h) * T + first
        dt, total, low, to_end = load_steps(
            p_step + o_steps, p_total + o_steps, None if p_low is None else p_low + o_steps, o_i, count
        )
        kept = tl.exp(last_of(total, BLOCK_T))
        from_enter = tl.exp(total)
        to_leave = tl.exp(to_end)
        if p_seq_idx is not None:
            kept = tl.where(last_segment == 0, kept, 0.0)
            from_enter = tl.where(segment == 0, from_enter, 0.0)
            to_leave = tl.where(segment == last_segment, to_leave, 0.0)
        decay = pair_decay(total, low, reaches, p_low)  # [i, j]
        b_weights = (CB * decay * dt[None, :]).to(b_B.dtype)

        dweights = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)  # dy_i x_j
        through_enter = tl.zeros([BLOCK_T], tl.float32)  # what the entering state gave y_i, times dy_i
        through_leave = tl.zeros([BLOCK_T], tl.float32)  # what token j gave the leaving state, times dh, without dt_j
        through_both = tl.zeros([BLOCK_N], tl.float32)  # what the entering state gave the leaving one, times dh
        for i_p in range(0, tl.cdiv(P, BLOCK_P)):
            o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
            m_p = o_p < P
            m_tile = m_t[:, None] & m_p[None, :]
            o_tile = (i_b * T + o_t[:, None]) * H * P + i_h * P + o_p[None, :]
            o_state = (i_block * H + i_h) * P * N + o_p[:, None] * N + o_n[None, :]
            m_state = m_p[:, None] & m_n[None, :]
            b_x = load_tile(p_x + i_b * stride_x_b + i_h * stride_x_h, o_t, stride_x_t, m_t, o_p, stride_x_p, m_p)
            b_dy = load_tile(p_dy + i_b * stride_dy_b + i_h * stride_dy_h, o_t, stride_dy_t, m_t, o_p, stride_dy_p, m_p)
            b_h = tl.load(p_h + o_state, mask=m_state, other=0.0)
            b_dh = tl.load(p_dh + o_state, mask=m_state, other=0.0)
            dy = b_dy.to(tl.float32)
            x = b_x.to(tl.float32)
            if p_D is not None:
                D = tl.load(p_D + i_h * stride_D_h + o_p * stride_D_p, mask=m_p, other=0.0).to(tl.float32)
            if p_z is not None:
                z = load_tile(p_z + i_b * stride_z_b + i_h * stride_z_h, o_t, stride_z_t, m_t, o_p, stride_z_p, m_p)
                z = z.to(tl.float32)
                y = tl.dot(b_C, tl.trans(b_h), input_precision=PRECISION) * from_enter[:, None]
                y = tl.dot(b_weights, b_x, y, input_precision=PRECISION)
                if p_D is not None:
                    y += D[None, :] * x
                dz = dy * y * silu_gradient(z)
                tl.store(p_dz + o_tile, dz.to(p_dz.dtype.element_ty), mask=m_tile)
                dy *= silu(z)
            b_dy = dy.to(b_x.dtype)

            dweights = tl.dot(b_dy, tl.trans(b_x), dweights, input_precision=PRECISION)
            dC_state = tl.dot(b_dy, b_h, input_precision=PRECISION) * from_enter[:, None]
            dC += dC_state
            through_enter += tl.sum(dC_state * b_C.to(tl.float32), 1)
            dB_state = tl.dot(b_x, b_dh, input_precision=PRECISION) * to_leave[:, None]
            dB += dB_state * dt[:, None]
            through_leave += tl.sum(dB_state * b_B.to(tl.float32), 1)
            through_both += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 0)
            dx = tl.dot(b_B, tl.trans(b_dh), input_precision=PRECISION) * (to_leave * dt)[:, None]
            dx = tl.dot(tl.trans(b_weights), b_dy, dx, input_precision=PRECISION)
            if p_D is not None:
                dx += D[None, :] * dy
                p_dD_row = p_dD + (i_block * H + i_h) * P
                tl.store(p_dD_row + o_p, tl.sum(dy * x, 0), mask=m_p)
            tl.store(p_dx + o_tile, dx.to(p_dx.dtype.element_ty), mask=m_tile)

        dweights *= decay
        dCB += dweights * dt[None, :]
        dweights *= CB
        ddt = tl.sum(dweights, 0) + through_leave
        # Of decay k: every pair j < k <= i, the leaving state's part of j < k, and y_i's part of the entering state.
        pairs = tl.dot(at_or_after, dweights * dt[None, :], input_precision=PRECISION)  # [k, j]
        crossing = tl.where(o_i[:, None] > o_i[None, :], pairs + (through_leave * dt)[None, :], 0.0)
        crossing += at_or_after * through_enter[None, :]
        ddecay = tl.sum(crossing, 1) + kept * tl.sum(through_both, 0)
        tl.store(p_dA + i_block * H + i_h, tl.sum(ddecay * dt, 0))
        ddt += ddecay * tl.load(p_A + i_h).to(tl.float32)
        p_dt_row = p_dt + i_b * stride_dt_b + i_h * stride_dt_h
        raw = load_dt(p_dt_row, stride_dt_t, o_t, m_t, p_dt_bias, i_h)
        if CLAMP:
            unclamped = step_size(raw, dt_min, dt_max, SOFTPLUS, False)
            ddt = tl.where((unclamped >= dt_min) & (unclamped <= dt_max), ddt, 0.0)
        if SOFTPLUS:
            ddt *= tl.sigmoid(raw)
        tl.store(p_ddt + (i_b * T + o_t) * H + i_h, ddt.to(p_ddt.dtype.element_ty), mask=m_t)
        if p_ddt_bias is not None:
            tl.store(p_ddt_bias + i_block * H + i_h, tl.sum(tl.where(m_t, ddt, 0.0), 0))

    b_dCB = dCB.to(b_B.dtype)
    dC = tl.dot(b_dCB, b_B, dC, input_precision=PRECISION)
    dB = tl.dot(tl.trans(b_dCB), b_C, dB, input_precision=PRECISION)
    groups = H // HEADS_PER_GROUP
    o_row = i_split * tokens + i_b * T + o_t
    o_part = (o_row[:, None] * groups + i_g) * N + o_n[None, :]
    tl.store(p_dB + o_part, dB, mask=m_t[:, None] & m_n[None, :])
    tl.store(p_dC + o_part, dC, mask=m_t[:, None] & m_n[None, :])


def ssd_scan_backward(
    dy: Tensor,
    dfinal_states: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, ...]:
    """``bitkernels::ssd_scan_backward``: recomputes the states instead of storing them in the forward."""
    op = "ssd_scan_backward"
    sequences = check_scan(
        op, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_min, dt_max, chunk_size
    )
    check_like(op, "dy", dy, x, tuple(x.shape))
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    check_floating(op, "dfinal_states", dfinal_states, x, (sequences, H, P, N))
    fresh = {"device": x.device}

    def absent():
        return torch.empty(0, dtype=torch.float32, **fresh)

    initial = None if initial_states is None else initial_states.contiguous()
    dfinal = None if dfinal_states is None else dfinal_states.contiguous()
    dinitial = absent() if initial is None else torch.empty(initial.shape, dtype=torch.float32, **fresh)
    if x.numel() == 0:
        if initial is not None:
            dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)

        def zeros(t, dtype):
            return absent() if t is None else torch.zeros(t.shape, dtype=dtype, **fresh)

        acc = torch.float32
        return (
            zeros(x, x.dtype), zeros(dt, dt.dtype), zeros(A, acc), zeros(B, B.dtype), zeros(C, C.dtype),
            zeros(D, acc), zeros(z, x.dtype), zeros(dt_bias, acc), dinitial,
        )  # fmt: skip

    if cu_seqlens is not None:
        cu_seqlens, seq_idx = cu_seqlens.contiguous(), segments_within(seq_idx, cu_seqlens)
    tile = backward_tile(x.dtype, P, N)
    chunks = divide(x, cu_seqlens, tile)
    A, dt_bias = A.contiguous(), None if dt_bias is None else dt_bias.contiguous()
    limits, flags = step_options(dt_softplus, dt_min, dt_max)
    decays = prepare(dt, A, dt_bias, seq_idx, chunks, x.dtype == torch.float32, limits, flags)
    n_blocks = chunks.count * chunks.blocks
    h = torch.empty(n_blocks, H, P, N, dtype=x.dtype, **fresh)
    dh = torch.empty_like(h)
    enter = enter_chunks(x, B, None, decays, chunks, tile, initial, None)
    walk_states(x, B, None, decays, chunks, tile, enter, h, None, None, False)
    del enter
    wanted = None if initial is None else dinitial
    leave = enter_chunks(dy, C, z, decays, chunks, tile, dfinal, wanted, backward=True)
    walk_states(dy, C, z, decays, chunks, tile, leave, dh, wanted if chunks.whole else None, None, True)
    del leave

    heads = H // G
    splits = min(heads, triton.cdiv(MIN_PROGRAMS, n_blocks * G))
    splits = triton.cdiv(heads, triton.cdiv(heads, splits))
    dx = torch.empty(x.shape, dtype=x.dtype, **fresh)
    dz = absent() if z is None else torch.empty(z.shape, dtype=x.dtype, **fresh)
    ddt = torch.empty(dt.shape, dtype=dt.dtype, **fresh)
    dB = torch.empty(splits, *B.shape, dtype=torch.float32, **fresh)
    dC = torch.empty_like(dB)
    # Zeros, as blocks past the end of their chunk add nothing.
    dA = torch.zeros(n_blocks, H, dtype=torch.float32, **fresh)
    ddt_bias = None if dt_bias is None else torch.zeros_like(dA)
    dD = None if D is None else torch.zeros(n_blocks, H, P, dtype=torch.float32, **fresh)
    D_strides = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
    ssd_scan_backward_kernel[(n_blocks, splits, G)](
        dy, x, B, C, D, z, dt, A, dt_bias, *decays.pointers, h, dh,
        dx, None if z is None else dz, ddt, dB, dC, dA, ddt_bias, dD, batch * T, H, P, N, *chunks.args,
        *dy.stride(), *x.stride(), *B.stride(), *C.stride(), *strides_of(z), *D_strides,
        *dt.stride(), *decays.strides, *limits,
        HEADS_PER_GROUP=heads, SPLITS=splits, BLOCK_T=tile.time, BLOCK_P=tile.headdim, BLOCK_N=tile.state, **flags,
        PRECISION=precision_of(x.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if dD is not None:
        dD = dD.sum((0, 2) if D.dim() == 1 else 0)
    return (
        dx,
        ddt,
        dA.sum(0),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        absent() if dD is None else dD,
        dz,
        absent() if ddt_bias is None else ddt_bias.sum(0),
        dinitial,
    )
