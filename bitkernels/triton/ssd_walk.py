"""The state before every chunk or block of the SSD scan, and backwards in time its gradient.

The state before a chunk takes three launches: every chunk walks from zero (``walk_states_kernel``), the results are
passed along each sequence (``pass_states_kernel``), and the walk that produces output starts from what was passed.
Gradients do the same backwards in time with ``dy`` and ``C`` in place of ``x`` and ``B``, in the same launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.arguments import cdiv
from bitkernels.triton.elementwise import silu
from bitkernels.triton.launch import Launch
from bitkernels.triton.ssd_states import (
    Chunks,
    Tile,
    chunk_span,
    columns,
    load_decays,
    load_segments,
    load_tile,
    pair_strides,
    precision_of,
    token_strides,
)

PASS_BLOCK = 1024
# Blocks of a walk under way at once: it does little but wait for them.
WALK_STAGES = 3
# Two heads of a group share the tiles of B or C, two thirds of what a walk of one head reads.
WALK_HEADS = 2
# Programs below which one head each is as fast: then the time to walk a block counts, not what is read.
ENOUGH = 200


@triton.jit
def enter_chunk(
    p_enter, i_row, o_state, m_state, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """[P, N] the state one head starts from."""
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if p_enter is not None:
        state += tl.load(p_enter + i_row * P * N + o_state, mask=m_state, other=0.0)
    return state


@triton.jit
def leave_chunk(state, kept, p_leave, p_decay, i_row, o_state, m_state, P: tl.constexpr, N: tl.constexpr):
    if p_leave is not None:
        tl.store(p_leave + i_row * P * N + o_state, state.to(p_leave.dtype.element_ty), mask=m_state)
    if p_decay is not None:
        tl.store(p_decay + i_row, kept)


@triton.jit
def walk_block(
    state, kept, b_v, p_u, stride_u_t, p_z, stride_z_t, p_step, p_total, p_low, i_decay, p_blocks, i_out, restarts,
    m_seen, o_state, m_state, o_i, m_t, o_p, m_p, P: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head through one block: its state after it, and what is left of the state the chunk entered with."""
    if p_blocks is not None:
        tl.store(p_blocks + i_out * P * N + o_state, state.to(p_blocks.dtype.element_ty), mask=m_state)
    total, _, to_end = load_decays(p_total, p_low, i_decay, BLOCK_T)
    decay = tl.exp2(tl.load(p_total + i_decay * BLOCK_T + BLOCK_T - 1))
    scale = tl.exp2(total if BACKWARD else to_end)
    if not BACKWARD:
        scale *= tl.load(p_step + i_decay * BLOCK_T + o_i)
    decay = tl.where(restarts == 0, decay, 0.0)
    scale = tl.where(m_seen, scale, 0.0)
    b_u = load_tile(p_u, stride_u_t, o_i, m_t, o_p, m_p)
    u = b_u.to(tl.float32) * scale[:, None]
    if p_z is not None:
        u *= silu(load_tile(p_z, stride_z_t, o_i, m_t, o_p, m_p).to(tl.float32))
    return tl.dot(tl.trans(u.to(b_u.dtype)), b_v, state * decay, input_precision=PRECISION), kept * decay


@triton.jit
def walk(
    p_u,  # [B, T, H, P] x, or dy backwards
    p_v,  # [B, T, G, N] B, or C backwards
    p_z,  # [B, T, H, P], gates u, or None
    p_step,
    p_total,
    p_low,
    p_seq_idx,
    p_enter,  # [chunks, H, P, N] the state to start from, None: zero
    p_blocks,  # [blocks, H, P, N] receives the state on entering each block from first_chunk on, or None
    p_leave,  # [chunks, H, P, N] receives the state after the chunk, or None
    p_decay,
    p_cu_seqlens,
    p_sequence,
    p_first,
    first_chunk,
    i_h,
    H,
    T,
    chunk_length,
    stride_u_b,
    stride_u_t,
    stride_u_h,
    stride_v_b,
    stride_v_t,
    stride_v_g,
    stride_z_b,
    stride_z_t,
    stride_z_h,
    stride_seq_b,
    stride_seq_t,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Through a chunk, in one of the directions of time."""
    i_chunk = tl.program_id(0).to(tl.int64) + first_chunk
    blocks = chunk_length // BLOCK_T
    o_p, m_p = columns(tl.program_id(2), P, BLOCK_P)
    o_n, m_n = columns(0, N, BLOCK_N)
    o_i = tl.arange(0, BLOCK_T)
    o_state = o_p[:, None] * N + o_n[None, :]
    m_state = m_p[:, None] & m_n[None, :]

    i_b, begin, length = chunk_span(i_chunk, T, chunk_length, p_cu_seqlens, p_sequence, p_first)
    p_u += i_b * stride_u_b + i_h * stride_u_h
    p_v += i_b * stride_v_b + (i_h // HEADS_PER_GROUP) * stride_v_g
    if p_z is not None:
        p_z += i_b * stride_z_b + i_h * stride_z_h
    if p_seq_idx is not None:
        p_seq_idx += i_b * stride_seq_b

    i_row = i_chunk * H + i_h
    state = enter_chunk(p_enter, i_row, o_state, m_state, P, N, BLOCK_P, BLOCK_N)
    kept = 1.0
    if HEADS == 2:
        state_2 = enter_chunk(p_enter, i_row + 1, o_state, m_state, P, N, BLOCK_P, BLOCK_N)
        kept_2 = 1.0
    n_blocks = tl.cdiv(length, BLOCK_T)
    for step in range(0, n_blocks):
        i_block = n_blocks - 1 - step if BACKWARD else step
        first = begin + i_block * BLOCK_T
        m_t = o_i < length - i_block * BLOCK_T
        m_seen = m_t
        restarts = 0
        if p_seq_idx is not None:
            segment = load_segments(p_seq_idx, stride_seq_t, first + o_i, m_t)
            restarts = tl.max(segment, 0)
            m_seen = segment == (0 if BACKWARD else restarts)
        b_v = load_tile(p_v + first * stride_v_t, stride_v_t, o_i, m_t, o_n, m_n)
        i_decay = (i_chunk * blocks + i_block) * H + i_h
        i_out = ((i_chunk - first_chunk) * blocks + i_block) * H + i_h
        p_u_block = p_u + first * stride_u_t
        p_z_block = None if p_z is None else p_z + first * stride_z_t
        state, kept = walk_block(
            state, kept, b_v, p_u_block, stride_u_t, p_z_block, stride_z_t, p_step, p_total, p_low, i_decay,
            p_blocks, i_out, restarts, m_seen, o_state, m_state, o_i, m_t, o_p, m_p, P, N, BLOCK_T, BACKWARD, PRECISION,
        )  # fmt: skip
        if HEADS == 2:
            p_z_block = None if p_z is None else p_z_block + stride_z_h
            state_2, kept_2 = walk_block(
                state_2, kept_2, b_v, p_u_block + stride_u_h, stride_u_t, p_z_block, stride_z_t, p_step, p_total, p_low,
                i_decay + 1, p_blocks, i_out + 1, restarts, m_seen, o_state, m_state, o_i, m_t, o_p, m_p, P, N, BLOCK_T,
                BACKWARD, PRECISION,
            )  # fmt: skip

    leave_chunk(state, kept, p_leave, p_decay, i_row, o_state, m_state, P, N)
    if HEADS == 2:
        leave_chunk(state_2, kept_2, p_leave, p_decay, i_row + 1, o_state, m_state, P, N)


@triton.jit(do_not_specialize=["first_chunk", "T", "chunk_length"])
def walk_states_kernel(
    p_x,  # [B, T, H, P]
    p_B,  # [B, T, G, N]
    p_dy,  # [B, T, H, P], or None for the forward walk alone
    p_C,  # [B, T, G, N] or None
    p_z,  # [B, T, H, P], gates dy, or None
    p_step,  # [blocks, H, BLOCK_T]
    p_total,  # [blocks, H, BLOCK_T]
    p_low,  # [blocks, H, BLOCK_T] or None
    p_seq_idx,  # [B, T] or None
    p_enter,  # [chunks, H, P, N] the states to start from, None: zero
    p_h,  # [blocks, H, P, N] receives the state before each block from first_chunk on, or None
    p_states,  # [chunks, H, P, N] receives the state after each chunk, or None
    p_leave,  # [chunks, H, P, N] the gradients of states to start from, None: zero
    p_dh,  # [blocks, H, P, N] receives the gradient of the state after each block, or None
    p_dstates,  # [chunks, H, P, N] receives the gradient of the state before each chunk, or None
    p_decay,  # [chunks, H] receives what is left of a state after a chunk, or None
    p_cu_seqlens,
    p_sequence,
    p_first,
    first_chunk,
    H,
    T,
    chunk_length,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    stride_B_b,
    stride_B_t,
    stride_B_g,
    stride_dy_b,
    stride_dy_t,
    stride_dy_h,
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
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_h = tl.program_id(1).to(tl.int64) * HEADS
    if i_h < H:
        walk(
            p_x, p_B, None, p_step, p_total, p_low, p_seq_idx, p_enter, p_h, p_states, p_decay, p_cu_seqlens,
            p_sequence, p_first, first_chunk, i_h, H, T, chunk_length, stride_x_b, stride_x_t, stride_x_h, stride_B_b,
            stride_B_t, stride_B_g, 0, 0, 0, stride_seq_b, stride_seq_t, P, N, HEADS, HEADS_PER_GROUP, BLOCK_T, BLOCK_P,
            BLOCK_N, False, PRECISION,
        )  # fmt: skip
    elif p_dy is not None:
        walk(
            p_dy, p_C, p_z, p_step, p_total, p_low, p_seq_idx, p_leave, p_dh, p_dstates, None, p_cu_seqlens,
            p_sequence, p_first, first_chunk, i_h - H, H, T, chunk_length, stride_dy_b, stride_dy_t, stride_dy_h,
            stride_C_b, stride_C_t, stride_C_g, stride_z_b, stride_z_t, stride_z_h, stride_seq_b, stride_seq_t, P, N,
            HEADS, HEADS_PER_GROUP, BLOCK_T, BLOCK_P, BLOCK_N, True, PRECISION,
        )  # fmt: skip


@triton.jit
def pass_states(
    p_states, p_decay, p_initial, p_final, p_cu_seqlens, p_first, i_h, H, SIZE, T, chunk_length, BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """Along a sequence, in one of the directions of time."""
    i_seq = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < SIZE
    if p_cu_seqlens is None:
        count = tl.cdiv(T, chunk_length).to(tl.int64)
        first = i_seq * count
    else:
        first = tl.load(p_first + i_seq)
        count = tl.load(p_first + i_seq + 1) - first

    state = tl.zeros([BLOCK], tl.float32)
    if p_initial is not None:
        state += tl.load(p_initial + (i_seq * H + i_h) * SIZE + o_e, mask=m_e, other=0.0).to(tl.float32)
    for step in range(0, count):
        i_row = (first + (count - 1 - step if BACKWARD else step)) * H + i_h
        added = tl.load(p_states + i_row * SIZE + o_e, mask=m_e, other=0.0)
        tl.store(p_states + i_row * SIZE + o_e, state, mask=m_e)
        state = state * tl.load(p_decay + i_row) + added
    if p_final is not None:
        tl.store(p_final + (i_seq * H + i_h) * SIZE + o_e, state.to(p_final.dtype.element_ty), mask=m_e)


@triton.jit(do_not_specialize=["T", "chunk_length"])
def pass_states_kernel(
    p_states,  # [chunks, H, SIZE] float32: the state each chunk adds, replaced by the state it starts from
    p_initial,  # [sequences, H, SIZE] or None
    p_final,  # [sequences, H, SIZE] or None
    p_dstates,  # [chunks, H, SIZE] float32, or None: the same of gradients, backwards in time
    p_dfinal,  # [sequences, H, SIZE] or None
    p_dinitial,  # [sequences, H, SIZE] or None
    p_decay,  # [chunks, H] float32
    p_cu_seqlens,
    p_sequence,
    p_first,
    H,
    SIZE,
    T,
    chunk_length,
    BLOCK: tl.constexpr,
):
    i_h = tl.program_id(1).to(tl.int64)
    if i_h < H:
        pass_states(
            p_states, p_decay, p_initial, p_final, p_cu_seqlens, p_first, i_h, H, SIZE, T, chunk_length, BLOCK, False
        )
    elif p_dstates is not None:
        pass_states(
            p_dstates, p_decay, p_dfinal, p_dinitial, p_cu_seqlens, p_first, i_h - H, H, SIZE, T, chunk_length, BLOCK,
            True,
        )  # fmt: skip


def walk_heads(x: Tensor, B: Tensor, z: Tensor | None, tile: Tile) -> int:
    """Heads a program may take: two where their states leave registers, and no gate needs any."""
    H, P = x.shape[2:]
    fits = z is None and tile.headdim >= P and tile.state <= 128 and (H // B.shape[2]) % WALK_HEADS == 0
    return WALK_HEADS if fits else 1


def plan_walk(
    x: Tensor,
    B: Tensor,
    dy: Tensor | None,
    C: Tensor | None,
    z: Tensor | None,
    seq_idx: Tensor | None,
    chunks: Chunks,
    tile: Tile,
    count: int,
) -> Launch:
    """Plans a walk through ``count`` chunks; call: the pointers of ``walk_states_kernel``, and the first chunk."""
    H, P = x.shape[2:]
    G, N = B.shape[2:]
    directions = 1 if dy is None else 2
    heads = walk_heads(x, B, z, tile)
    if count * H * directions < heads * ENOUGH:
        heads = 1
    return Launch(
        walk_states_kernel, (count, directions * H // heads, cdiv(P, tile.headdim)), H, chunks.T, chunks.length,
        *token_strides(x, B, dy, C, z), *pair_strides(seq_idx), P, N, heads, H // G, tile.time, tile.headdim,
        tile.state, precision_of(x.dtype), num_warps=tile.warps, num_stages=WALK_STAGES,
    )  # fmt: skip


class EnterChunks:
    """Plans the states [chunks, H, P, N] that chunks start from, and with dy the gradients they end with.

    Call: both, None for zero; fills ``final`` and ``dinitial`` unless chunks are whole.
    """

    def __init__(self, x, B, dy, C, z, seq_idx, chunks: Chunks, tile: Tile):
        self.whole = chunks.whole
        H, P, N = *x.shape[2:], B.shape[3]
        self.directions = 1 if dy is None else 2
        self.shape = self.directions, chunks.count, H, P, N
        self.walk = plan_walk(x, B, dy, C, z, seq_idx, chunks, tile, chunks.count)
        self.pass_on = Launch(
            pass_states_kernel, (chunks.sequences, self.directions * H, cdiv(P * N, PASS_BLOCK)), H, P * N, chunks.T,
            chunks.length, PASS_BLOCK, num_warps=4,
        )  # fmt: skip

    def __call__(
        self, x, B, dy, C, z, decays: tuple, seq_idx, table: tuple, initial, final, dfinal=None, dinitial=None
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.whole:
            return initial, dfinal
        states = torch.empty(self.shape, dtype=torch.float32, device=x.device)
        decay = torch.empty(self.shape[1:3], dtype=torch.float32, device=x.device)
        states, dstates = states[0], states[1] if self.directions == 2 else None
        self.walk(x, B, dy, C, z, *decays, seq_idx, None, None, states, None, None, dstates, decay, *table, 0)
        self.pass_on(states, initial, final, dstates, dfinal, dinitial, decay, *table)
        return states, dstates
