"""The forward scan by chunks, in Triton: y and the final states, see ``ssd_states`` for the division of time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.arguments import cdiv
from bitkernels.triton.elementwise import silu, step_options
from bitkernels.triton.launch import Launch
from bitkernels.triton.ssd_states import (
    Decays,
    chunk_span,
    chunk_table,
    columns,
    dense_inputs,
    divide,
    load_decays,
    load_segments,
    load_tile,
    pair_decay,
    pair_strides,
    precision_of,
    scan_tile,
    token_strides,
)
from bitkernels.triton.ssd_walk import EnterChunks

# With a block ahead two programs still fit the shared memory of a multiprocessor.
STAGES = 2


@triton.jit(do_not_specialize=["T", "chunk_length"])
def ssd_scan_kernel(
    p_x,  # [B, T, H, P]
    p_B,  # [B, T, G, N]
    p_C,  # [B, T, G, N]
    p_D,  # [H] or [H, P] by strides, or None
    p_z,  # [B, T, H, P] or None
    p_step,  # [blocks, H, BLOCK_T]
    p_total,  # [blocks, H, BLOCK_T]
    p_low,  # [blocks, H, BLOCK_T] or None
    p_seq_idx,  # [B, T] or None
    p_enter,  # [chunks, H, P, N] the state each chunk starts from, None: zero
    p_y,  # [B, T, H, P] contiguous
    p_leave,  # [chunks, H, P, N] receives the state after each chunk, or None
    p_cu_seqlens,
    p_sequence,
    p_first,
    H,
    T,
    chunk_length,
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
    stride_D_h,
    stride_D_p,
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
    i_chunk = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_g = i_h // HEADS_PER_GROUP
    o_p, m_p = columns(tl.program_id(2), P, BLOCK_P)
    o_n, m_n = columns(0, N, BLOCK_N)
    o_i = tl.arange(0, BLOCK_T)
    i_state = (i_chunk * H + i_h) * P * N
    o_state = o_p[:, None] * N + o_n[None, :]
    m_state = m_p[:, None] & m_n[None, :]
    reaches = o_i[:, None] <= o_i[None, :]

    i_b, begin, length = chunk_span(i_chunk, T, chunk_length, p_cu_seqlens, p_sequence, p_first)
    p_x += i_b * stride_x_b + i_h * stride_x_h
    p_B += i_b * stride_B_b + i_g * stride_B_g
    p_C += i_b * stride_C_b + i_g * stride_C_g
    p_y += (i_b * T * H + i_h) * P
    if p_z is not None:
        p_z += i_b * stride_z_b + i_h * stride_z_h
    if p_seq_idx is not None:
        p_seq_idx += i_b * stride_seq_b
    if p_D is not None:
        D = tl.load(p_D + i_h * stride_D_h + o_p * stride_D_p, mask=m_p).to(tl.float32)

    if p_enter is not None:
        state = tl.load(p_enter + i_state + o_state, mask=m_state, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i_block in range(0, tl.cdiv(length, BLOCK_T)):
        first = begin + i_block * BLOCK_T
        m_t = o_i < length - i_block * BLOCK_T
        i_row = (i_chunk * (chunk_length // BLOCK_T) + i_block) * H + i_h
        step = tl.load(p_step + i_row * BLOCK_T + o_i)
        total, low, to_end = load_decays(p_total, p_low, i_row, BLOCK_T)
        kept = tl.exp2(tl.load(p_total + i_row * BLOCK_T + BLOCK_T - 1))
        from_enter = tl.exp2(total)
        to_leave = tl.exp2(to_end) * step
        visible = reaches
        if p_seq_idx is not None:
            segment = load_segments(p_seq_idx, stride_seq_t, first + o_i, m_t)
            last_segment = tl.max(segment, 0)
            visible = reaches & (segment[:, None] == segment[None, :])
            kept = tl.where(last_segment == 0, kept, 0.0)
            from_enter = tl.where(segment == 0, from_enter, 0.0)
            to_leave = tl.where(segment == last_segment, to_leave, 0.0)

        b_x = load_tile(p_x + first * stride_x_t, stride_x_t, o_i, m_t, o_p, m_p)
        b_B = load_tile(p_B + first * stride_B_t, stride_B_t, o_i, m_t, o_n, m_n)
        b_C = load_tile(p_C + first * stride_C_t, stride_C_t, o_i, m_t, o_n, m_n)
        # Outputs are [p, i] and pairs [j, i]: the state is a left operand and stays in registers.
        y = tl.dot(state.to(b_x.dtype), tl.trans(b_C), input_precision=PRECISION) * from_enter[None, :]
        weights = tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION)
        weights *= pair_decay(-total, -low, visible, p_low) * step[:, None]
        y = tl.dot(tl.trans(b_x), weights.to(b_x.dtype), y, input_precision=PRECISION)
        y = tl.trans(y)
        x = b_x.to(tl.float32)
        if p_D is not None:
            y += D[None, :] * x
        if p_z is not None:
            y *= silu(load_tile(p_z + first * stride_z_t, stride_z_t, o_i, m_t, o_p, m_p).to(tl.float32))
        o_y = o_i[:, None] * (H * P) + o_p[None, :]
        tl.store(p_y + first * H * P + o_y, y.to(p_y.dtype.element_ty), mask=m_t[:, None] & m_p[None, :])
        added = (x * to_leave[:, None]).to(b_x.dtype)
        state = tl.dot(tl.trans(added), b_B, state * kept, input_precision=PRECISION)

    if p_leave is not None:
        tl.store(p_leave + i_state + o_state, state.to(p_leave.dtype.element_ty), mask=m_state)


class ChunkedScan:
    """Plans the launches for arguments that were checked; call: y and the final states."""

    def __init__(self, x, dt, B, C, D, z, seq_idx, cu_seqlens, sequences, dt_softplus, dt_min, dt_max):
        H, P = x.shape[2:]
        G, N = B.shape[2:]
        self.final_shape = sequences, H, P, N
        x, B, C, z, seq_idx, cu_seqlens = dense_inputs(x, B, C, z, seq_idx, cu_seqlens)
        tile = scan_tile(x.dtype, P, N)
        self.chunks = chunks = divide(x, None if cu_seqlens is None else sequences, tile, H)
        exact = x.dtype == torch.float32
        self.decays = Decays(dt, chunks, exact, *step_options(dt_softplus, dt_min, dt_max))
        self.enter = EnterChunks(x, B, None, None, None, seq_idx, chunks, tile)
        self.scan = Launch(
            ssd_scan_kernel, (chunks.count, H, cdiv(P, tile.headdim)), H, chunks.T, chunks.length,
            *token_strides(x, B, C, z), *pair_strides(D), *pair_strides(seq_idx), P, N, H // G, tile.time, tile.headdim,
            tile.state, precision_of(x.dtype), num_warps=tile.warps, num_stages=STAGES,
        )  # fmt: skip

    def __call__(self, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens) -> tuple[Tensor, Tensor]:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = torch.empty(self.final_shape, dtype=torch.float32, device=x.device)
        initial = None if initial_states is None else initial_states.contiguous()
        x, B, C, z, seq_idx, cu_seqlens = dense_inputs(x, B, C, z, seq_idx, cu_seqlens)
        table = chunk_table(self.chunks, cu_seqlens)
        decays = self.decays(dt, A.contiguous(), None if dt_bias is None else dt_bias.contiguous(), table)
        enter, _ = self.enter(x, B, None, None, None, decays, seq_idx, table, initial, final)
        self.scan(x, B, C, D, z, *decays, seq_idx, enter, y, final if self.chunks.whole else None, *table)
        return y, final
