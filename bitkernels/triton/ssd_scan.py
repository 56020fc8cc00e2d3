"""The forward SSD scan: y and the final states, see ``ssd_states`` for the division of time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton import arguments
from bitkernels.triton.elementwise import silu, step_options
from bitkernels.triton.mixer_arguments import check_scan
from bitkernels.triton.ssd_scan_backward import ssd_scan_backward
from bitkernels.triton.ssd_states import (
    chunk_span,
    divide,
    enter_chunks,
    forward_tile,
    last_of,
    load_segments,
    load_steps,
    load_tile,
    pair_decay,
    precision_of,
    prepare,
    segments_within,
    strides_of,
)


@triton.jit(do_not_specialize=["T", "chunk_length"])
def ssd_scan_kernel(
    p_x,  # [B, T, H, P]
    p_B,  # [B, T, G, N]
    p_C,  # [B, T, G, N]
    p_D,  # [H] or [H, P] by strides, or None
    p_z,  # [B, T, H, P] or None
    p_step,  # [B, H, T]
    p_total,  # [B, H, T]
    p_low,  # [B, H, T] or None
    p_seq_idx,  # [B, T] or None
    p_enter,  # [chunks, H, P, N] the state each chunk starts from, None: zero
    p_y,  # [B, T, H, P] contiguous
    p_leave,  # [chunks, H, P, N] receives the state after each chunk, or None
    H,
    P,
    N,
    T,
    chunk_length,
    p_cu_seqlens,
    p_sequence,
    p_first,
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
    stride_seq_b,
    stride_seq_t,
    HEADS_PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_g = i_h // HEADS_PER_GROUP
    o_p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    o_i = tl.arange(0, BLOCK_T)
    m_p = o_p < P
    m_n = o_n < N
    m_state = m_n[:, None] & m_p[None, :]
    o_state = (i_chunk * H + i_h) * P * N + o_p[None, :] * N + o_n[:, None]

    i_b, begin, length = chunk_span(i_chunk, T, chunk_length, p_cu_seqlens, p_sequence, p_first)
    p_x += i_b * stride_x_b + i_h * stride_x_h
    p_B += i_b * stride_B_b + i_g * stride_B_g
    p_C += i_b * stride_C_b + i_g * stride_C_g
    p_step += (i_b * H + i_h) * T + begin
    p_total += (i_b * H + i_h) * T + begin
    if p_low is not None:
        p_low += (i_b * H + i_h) * T + begin
    p_y += (i_b * T * H + i_h) * P
    if p_z is not None:
        p_z += i_b * stride_z_b + i_h * stride_z_h
    if p_seq_idx is not None:
        p_seq_idx += i_b * stride_seq_b
    if p_D is not None:
        D = tl.load(p_D + i_h * stride_D_h + o_p * stride_D_p, mask=m_p, other=0.0).to(tl.float32)

    if p_enter is not None:
        state = tl.load(p_enter + o_state, mask=m_state, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for i_block in range(0, tl.cdiv(length, BLOCK_T)):
        o_first = i_block * BLOCK_T
        o_t = begin + o_first + o_i
        m_t = o_i < length - o_first
        dt, total, low, to_end = load_steps(
            p_step + o_first, p_total + o_first, None if p_low is None else p_low + o_first, o_i, length - o_first
        )
        reaches = o_i[:, None] >= o_i[None, :]
        kept = tl.exp(last_of(total, BLOCK_T))
        from_enter = tl.exp(total)
        to_leave = tl.exp(to_end) * dt
        if p_seq_idx is not None:
            segment = load_segments(p_seq_idx, stride_seq_t, o_t, m_t)
            last_segment = last_of(segment, BLOCK_T)
            reaches = reaches & (segment[:, None] == segment[None, :])
            kept = tl.where(last_segment == 0, kept, 0.0)
            from_enter = tl.where(segment == 0, from_enter, 0.0)
            to_leave = tl.where(segment == last_segment, to_leave, 0.0)

        b_x = load_tile(p_x, o_t, stride_x_t, m_t, o_p, stride_x_p, m_p)
        b_B = load_tile(p_B, o_t, stride_B_t, m_t, o_n, stride_B_n, m_n).to(b_x.dtype)
        b_C = load_tile(p_C, o_t, stride_C_t, m_t, o_n, stride_C_n, m_n).to(b_x.dtype)
        y = tl.dot(b_C, state.to(b_x.dtype), input_precision=PRECISION) * from_enter[:, None]
        weights = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)
        weights *= pair_decay(total, low, reaches, p_low) * dt[None, :]
        y = tl.dot(weights.to(b_x.dtype), b_x, y, input_precision=PRECISION)
        x = b_x.to(tl.float32)
        if p_D is not None:
            y += D[None, :] * x
        if p_z is not None:
            y *= silu(load_tile(p_z, o_t, stride_z_t, m_t, o_p, stride_z_p, m_p).to(tl.float32))
        tl.store(
            p_y + o_t[:, None] * H * P + o_p[None, :], y.to(p_y.dtype.element_ty), mask=m_t[:, None] & m_p[None, :]
        )
        added = (x * to_leave[:, None]).to(b_x.dtype)
        state = tl.dot(tl.trans(b_B), added, state * kept, input_precision=PRECISION)

    if p_leave is not None:
        tl.store(p_leave + o_state, state.to(p_leave.dtype.element_ty), mask=m_state)


def ssd_scan(
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
) -> tuple[Tensor, Tensor]:
    """``bitkernels::ssd_scan``. ``chunk_size`` is a hint this implementation does not take."""
    sequences = check_scan(
        "ssd_scan", x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_min, dt_max, chunk_size
    )
    H, P = x.shape[2:]
    G, N = B.shape[2:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(sequences, H, P, N, dtype=torch.float32, device=x.device)
    initial = None if initial_states is None else initial_states.contiguous()
    if x.numel() == 0:
        return y.zero_(), final.zero_() if initial is None else final.copy_(initial)

    if cu_seqlens is not None:
        cu_seqlens, seq_idx = cu_seqlens.contiguous(), segments_within(seq_idx, cu_seqlens)
    tile = forward_tile(x.dtype, P, N)
    chunks = divide(x, cu_seqlens, tile)
    A, dt_bias = A.contiguous(), None if dt_bias is None else dt_bias.contiguous()
    decays = prepare(
        dt, A, dt_bias, seq_idx, chunks, x.dtype == torch.float32, *step_options(dt_softplus, dt_min, dt_max)
    )
    enter = enter_chunks(x, B, None, decays, chunks, tile, initial, final)
    D_strides = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
    ssd_scan_kernel[(chunks.count, H, triton.cdiv(P, tile.headdim))](
        x, B, C, D, z, *decays.pointers, enter, y, final if chunks.whole else None, H, P, N, *chunks.args,
        *x.stride(), *B.stride(), *C.stride(), *strides_of(z), *D_strides, *decays.strides,
        HEADS_PER_GROUP=H // G, BLOCK_T=tile.time, BLOCK_P=tile.headdim, BLOCK_N=tile.state,
        PRECISION=precision_of(x.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y, final


def register(dispatch_key: str = "CUDA") -> None:
    arguments.register(dispatch_key, ssd_scan, ssd_scan_backward)
