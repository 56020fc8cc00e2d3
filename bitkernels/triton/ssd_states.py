"""What the forward and backward SSD scan share: the division of time, step sizes, and the states.

Time is divided twice. A *block* of 16 to 64 tokens is the unit of matrix work: inside it the scan is a masked
attention-like product. A *chunk* is a run of blocks that one program walks through with the state in registers, so
states reach memory only at chunk boundaries. Chunks never straddle sequences, and are as long as the number of
programs allows: with enough heads and batch, one chunk is a whole sequence.

The state before a chunk takes three launches: every chunk walks from zero (``walk_states``), the results are passed
along each sequence (``pass_states``), and the walk that produces output starts from what was passed. Gradients do
the same backwards in time with ``dy`` and ``C`` in place of ``x`` and ``B``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.elementwise import silu, step_size

# Programs worth having before chunks grow beyond a block: several for each multiprocessor of a large GPU.
MIN_PROGRAMS = 1024
PASS_BLOCK = 1024
STEPS_BLOCK_H = 16


@dataclass(frozen=True)
class Tile:
    """How much of each axis a program holds; products need at least 16."""

    time: int
    headdim: int
    state: int
    warps: int
    stages: int = 2


def forward_tile(dtype: torch.dtype, P: int, N: int) -> Tile:
    """Registers hold a float32 state [state, headdim] and a [time, headdim] output."""
    state = max(16, triton.next_power_of_2(N))
    headdim = max(16, triton.next_power_of_2(P))
    if dtype == torch.float32:
        return Tile(16, min(headdim, 32), state, 8)
    return Tile(64, min(headdim, 32), state, 4 if state <= 128 else 8)


@dataclass(frozen=True)
class Chunks:
    """The division of [B, T] tokens into chunks of ``length`` (a multiple of the block), see ``chunk_span``."""

    T: int
    length: int
    block: int
    count: int  # with cu_seqlens an upper bound, so that nothing waits for the device
    sequences: int
    cu_seqlens: Tensor | None = None
    sequence: Tensor | None = None  # int64 [count], the sequence of each chunk
    first: Tensor | None = None  # int64 [sequences + 1], the first chunk of each sequence

    @property
    def blocks(self) -> int:
        """Blocks in a chunk."""
        return self.length // self.block

    @property
    def whole(self) -> bool:
        """Every chunk is a whole sequence: nothing has to be passed between chunks."""
        return self.cu_seqlens is None and self.count == self.sequences

    @property
    def args(self) -> tuple:
        """The arguments of ``chunk_span`` in their order."""
        return self.T, self.length, self.cu_seqlens, self.sequence, self.first


def divide(x: Tensor, cu_seqlens: Tensor | None, tile: Tile) -> Chunks:
    batch, T, H, P = x.shape
    columns = H * triton.cdiv(P, tile.headdim)
    blocks = max(1, batch * T * columns // (MIN_PROGRAMS * tile.time))
    # Powers of two keep the number of chunks from jumping with every token.
    length = tile.time * 2 ** (blocks.bit_length() - 1)
    if cu_seqlens is None:
        length = min(length, tile.time * triton.cdiv(T, tile.time))
        return Chunks(T, length, tile.time, batch * triton.cdiv(T, length), batch)
    sequences = cu_seqlens.shape[0] - 1
    count = triton.cdiv(T, length) + sequences
    first = torch.zeros(sequences + 1, dtype=torch.int64, device=x.device)
    torch.cumsum((cu_seqlens.diff().clamp_(min=0) + (length - 1)) // length, 0, out=first[1:])
    first.clamp_(max=count)  # like the bounds in chunk_span: no cu_seqlens leads outside of x
    # Chunks past the last sequence fall into it and find themselves empty.
    sequence = torch.searchsorted(first[1:], torch.arange(count, device=x.device), right=True).clamp_(max=sequences - 1)
    return Chunks(T, length, tile.time, count, sequences, cu_seqlens, sequence, first)


def segments_within(seq_idx: Tensor | None, cu_seqlens: Tensor) -> Tensor | None:
    """``seq_idx`` without the changes at the starts of sequences: those keep their initial states."""
    if seq_idx is None:
        return None
    # One place past the end, where an empty last sequence starts.
    changes = F.pad(seq_idx.diff(dim=1) != 0, (1, 1))
    return changes.index_fill_(1, cu_seqlens[:-1].long(), False).cumsum(1, dtype=torch.int32)[:, :-1]


@triton.jit
def chunk_span(i_chunk, T, length, p_cu_seqlens, p_sequence, p_first):
    """Batch row, first token and number of tokens of a chunk."""
    if p_cu_seqlens is None:
        per_row = tl.cdiv(T, length)
        i_b = i_chunk // per_row
        begin = (i_chunk % per_row) * length
        end = T.to(tl.int64)
    else:
        i_b = i_chunk * 0
        i_seq = tl.load(p_sequence + i_chunk)
        begin = tl.load(p_cu_seqlens + i_seq).to(tl.int64) + (i_chunk - tl.load(p_first + i_seq)) * length
        begin = tl.maximum(begin, 0)
        end = tl.minimum(tl.load(p_cu_seqlens + i_seq + 1).to(tl.int64), T)
    return i_b, begin, tl.maximum(tl.minimum(end - begin, length), 0).to(tl.int32)


@triton.jit
def block_span(i_block, T, chunk_length, p_cu_seqlens, p_sequence, p_first, BLOCK_T: tl.constexpr):
    """Batch row and tokens of a block, and which of them are there."""
    blocks = chunk_length // BLOCK_T
    i_b, begin, length = chunk_span(i_block // blocks, T, chunk_length, p_cu_seqlens, p_sequence, p_first)
    offset = (i_block % blocks).to(tl.int32) * BLOCK_T
    o_i = tl.arange(0, BLOCK_T)
    return i_b, begin + offset + o_i, o_i < length - offset


@triton.jit
def load_tile(p_tile, o_row, stride_row, m_row, o_col, stride_col, m_col):
    """[rows, columns], zero where masked."""
    return tl.load(
        p_tile + o_row[:, None] * stride_row + o_col[None, :] * stride_col,
        mask=m_row[:, None] & m_col[None, :],
        other=0.0,
    )


@triton.jit
def load_steps(p_step, p_total, p_low, o_i, count):
    """[BLOCK_T] step sizes, log decays since the block began, and those from there to its end.

    Tokens past ``count`` (at least 1) have a step of zero, so that they change nothing.
    """
    step = tl.load(p_step + o_i, mask=o_i < count, other=0.0)
    o_i = tl.minimum(o_i, count - 1)
    o_last = tl.minimum(count, o_i.shape[0]) - 1
    total = tl.load(p_total + o_i)
    to_end = tl.load(p_total + o_last) - total
    low = total
    if p_low is not None:
        low = tl.load(p_low + o_i)
        to_end += tl.load(p_low + o_last) - low
    return step, total, low, to_end


@triton.jit
def pair_decay(total, low, reaches, p_low):
    """[BLOCK_T, BLOCK_T] what is left at token i of what token j brought; the exponent is masked, never positive."""
    exponent = total[:, None] - total[None, :]
    if p_low is not None:
        exponent += low[:, None] - low[None, :]
    return tl.exp(tl.where(reaches, exponent, -float("inf")))


@triton.jit
def load_segments(p_seq_idx, stride_t, o_t, m_t):
    """[BLOCK_T] how often the sequence has changed since the token before the block."""
    m_before = m_t & (o_t > 0)
    here = tl.load(p_seq_idx + o_t * stride_t, mask=m_before, other=0)
    before = tl.load(p_seq_idx + (o_t - 1) * stride_t, mask=m_before, other=0)
    return tl.cumsum((here != before).to(tl.int32), 0)


@triton.jit
def last_of(v, BLOCK_T: tl.constexpr):
    """The last element of a [BLOCK_T] vector."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_T) == BLOCK_T - 1, v, 0), 0)


@triton.jit(do_not_specialize=["T", "chunk_length"])
def steps_kernel(
    p_dt,  # [B, T, H]
    p_A,  # [H]
    p_dt_bias,  # [H] or None
    p_step,  # [B, H, T] float32 receives the step sizes
    p_total,  # [B, H, T] float32 receives the log decays since the block began
    p_low,  # [B, H, T] float32 receives what float32 loses of them, or None
    H,
    T,
    chunk_length,
    p_cu_seqlens,
    p_sequence,
    p_first,
    stride_dt_b,
    stride_dt_t,
    stride_dt_h,
    dt_min,
    dt_max,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
):
    i_b, o_t, m_t = block_span(
        tl.program_id(0).to(tl.int64), T, chunk_length, p_cu_seqlens, p_sequence, p_first, BLOCK_T
    )
    o_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    dt = load_tile(p_dt + i_b * stride_dt_b, o_t, stride_dt_t, m_t, o_h, stride_dt_h, m_h).to(tl.float32)
    if p_dt_bias is not None:
        dt += tl.load(p_dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    step = tl.where(m_t[:, None], step_size(dt, dt_min, dt_max, SOFTPLUS, CLAMP), 0.0)
    A = tl.load(p_A + o_h, mask=m_h, other=0.0)
    if p_low is None:
        total = tl.cumsum(step * A.to(tl.float32)[None, :], 0)
    else:
        exact = tl.cumsum(step.to(tl.float64) * A.to(tl.float64)[None, :], 0)
        total = exact.to(tl.float32)
    o_out = (i_b * H + o_h)[None, :] * T + o_t[:, None]
    m_out = m_t[:, None] & m_h[None, :]
    tl.store(p_step + o_out, step, mask=m_out)
    tl.store(p_total + o_out, total, mask=m_out)
    if p_low is not None:
        tl.store(p_low + o_out, (exact - total.to(tl.float64)).to(tl.float32), mask=m_out)


@triton.jit(do_not_specialize=["T", "chunk_length"])
def walk_states_kernel(
    p_u,  # [B, T, H, P] x, or dy backwards
    p_v,  # [B, T, G, N] B, or C backwards
    p_z,  # [B, T, H, P], gates u, or None
    p_step,  # [B, H, T]
    p_total,  # [B, H, T]
    p_low,  # [B, H, T] or None
    p_seq_idx,  # [B, T] or None
    p_enter,  # [chunks, H, P, N] the state to start from, None: zero
    p_blocks,  # [chunks * blocks, H, P, N] receives the state on entering each block, or None
    p_leave,  # [chunks, H, P, N] receives the state after the chunk, or None
    p_decay,  # [chunks, H] receives what is left of the entering state, or None
    H,
    P,
    N,
    T,
    chunk_length,
    p_cu_seqlens,
    p_sequence,
    p_first,
    stride_u_b,
    stride_u_t,
    stride_u_h,
    stride_u_p,
    stride_v_b,
    stride_v_t,
    stride_v_g,
    stride_v_n,
    stride_z_b,
    stride_z_t,
    stride_z_h,
    stride_z_p,
    stride_seq_b,
    stride_seq_t,
    HEADS_PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    o_p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    o_i = tl.arange(0, BLOCK_T)
    m_p = o_p < P
    m_n = o_n < N
    m_state = m_n[:, None] & m_p[None, :]
    o_state = o_p.to(tl.int64)[None, :] * N + o_n[:, None]

    i_b, begin, length = chunk_span(i_chunk, T, chunk_length, p_cu_seqlens, p_sequence, p_first)
    p_u += i_b * stride_u_b + i_h * stride_u_h
    p_v += i_b * stride_v_b + (i_h // HEADS_PER_GROUP) * stride_v_g
    p_step += (i_b * H + i_h) * T + begin
    p_total += (i_b * H + i_h) * T + begin
    if p_low is not None:
        p_low += (i_b * H + i_h) * T + begin
    if p_z is not None:
        p_z += i_b * stride_z_b + i_h * stride_z_h
    if p_seq_idx is not None:
        p_seq_idx += i_b * stride_seq_b

    if p_enter is not None:
        state = tl.load(p_enter + (i_chunk * H + i_h) * P * N + o_state, mask=m_state, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    kept = 1.0
    n_blocks = tl.cdiv(length, BLOCK_T)
    for step in range(0, n_blocks):
        i_block = n_blocks - 1 - step if BACKWARD else step
        if p_blocks is not None:
            i_row = (i_chunk * (chunk_length // BLOCK_T) + i_block) * H + i_h
            tl.store(p_blocks + i_row * P * N + o_state, state.to(p_blocks.dtype.element_ty), mask=m_state)
        o_first = i_block * BLOCK_T
        o_t = begin + o_first + o_i
        m_t = o_i < length - o_first
        dt, total, _, to_end = load_steps(
            p_step + o_first, p_total + o_first, None if p_low is None else p_low + o_first, o_i, length - o_first
        )
        decay = tl.exp(last_of(total, BLOCK_T))
        scale = tl.exp(total) if BACKWARD else tl.exp(to_end) * dt
        if p_seq_idx is not None:
            segment = load_segments(p_seq_idx, stride_seq_t, o_t, m_t)
            last_segment = last_of(segment, BLOCK_T)
            decay = tl.where(last_segment == 0, decay, 0.0)
            scale = tl.where(segment == (0 if BACKWARD else last_segment), scale, 0.0)
        b_u = load_tile(p_u, o_t, stride_u_t, m_t, o_p, stride_u_p, m_p)
        b_v = load_tile(p_v, o_t, stride_v_t, m_t, o_n, stride_v_n, m_n)
        u = b_u.to(tl.float32) * scale[:, None]
        if p_z is not None:
            u *= silu(load_tile(p_z, o_t, stride_z_t, m_t, o_p, stride_z_p, m_p).to(tl.float32))
        state = tl.dot(tl.trans(b_v.to(b_u.dtype)), u.to(b_u.dtype), state * decay, input_precision=PRECISION)
        kept *= decay

    if p_leave is not None:
        tl.store(p_leave + (i_chunk * H + i_h) * P * N + o_state, state.to(p_leave.dtype.element_ty), mask=m_state)
    if p_decay is not None:
        tl.store(p_decay + i_chunk * H + i_h, kept)


@triton.jit(do_not_specialize=["T", "chunk_length"])
def pass_states_kernel(
    p_states,  # [chunks, H, SIZE] float32: the state each chunk adds, replaced by the state it starts from
    p_decay,  # [chunks, H] float32
    p_initial,  # [sequences, H, SIZE] or None
    p_final,  # [sequences, H, SIZE] or None
    H,
    SIZE,
    T,
    chunk_length,
    p_cu_seqlens,
    p_sequence,
    p_first,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
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


@dataclass(frozen=True)
class Decays:
    """What the kernels that move states read of time."""

    step: Tensor  # [B, H, T] float32
    total: Tensor  # [B, H, T] float32
    low: Tensor | None  # [B, H, T] float32
    seq_idx: Tensor | None  # [B, T]

    @property
    def pointers(self) -> tuple:
        return self.step, self.total, self.low, self.seq_idx

    @property
    def strides(self) -> tuple:
        return (0, 0) if self.seq_idx is None else self.seq_idx.stride()


def prepare(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    chunks: Chunks,
    exact: bool,
    limits: tuple,
    flags: dict,
) -> Decays:
    """Step sizes and decays; A and dt_bias contiguous, limits and flags as of ``step_options``.

    A step of 10 with A = -16 adds -160 to a running sum; the differences of such sums that decay little are then good
    to about 1e-5 only. ``exact`` keeps them as pairs of float32, which float32 results need and 16-bit ones do not.
    """
    batch, T, H = dt.shape
    step = torch.empty(batch, H, T, dtype=torch.float32, device=dt.device)
    total = torch.empty_like(step)
    low = torch.empty_like(step) if exact else None
    steps_kernel[(chunks.count * chunks.blocks, triton.cdiv(H, STEPS_BLOCK_H))](
        dt, A, dt_bias, step, total, low, H, *chunks.args, *dt.stride(), *limits,
        BLOCK_T=chunks.block, BLOCK_H=STEPS_BLOCK_H, **flags, num_warps=4,
    )  # fmt: skip
    return Decays(step, total, low, seq_idx)


def strides_of(t: Tensor | None) -> tuple:
    return (0, 0, 0, 0) if t is None else t.stride()


def precision_of(dtype: torch.dtype) -> str:
    """Three TF32 products hold a float32 product to about 1e-6; 16-bit operands ignore this."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def walk_states(
    u: Tensor,
    v: Tensor,
    z: Tensor | None,
    decays: Decays,
    chunks: Chunks,
    tile: Tile,
    enter: Tensor | None,
    blocks: Tensor | None,
    leave: Tensor | None,
    decay: Tensor | None,
    backward: bool,
) -> None:
    H, P = u.shape[2:]
    G, N = v.shape[2:]
    walk_states_kernel[(chunks.count, H, triton.cdiv(P, tile.headdim))](
        u, v, z, *decays.pointers, enter, blocks, leave, decay, H, P, N, *chunks.args,
        *u.stride(), *v.stride(), *strides_of(z), *decays.strides,
        HEADS_PER_GROUP=H // G, BLOCK_T=tile.time, BLOCK_P=tile.headdim, BLOCK_N=tile.state,
        BACKWARD=backward, PRECISION=precision_of(u.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def enter_chunks(
    u: Tensor,
    v: Tensor,
    z: Tensor | None,
    decays: Decays,
    chunks: Chunks,
    tile: Tile,
    initial: Tensor | None,
    final: Tensor | None,
    backward: bool = False,
) -> Tensor | None:
    """The state [chunks, H, P, N] that each chunk starts from, None for zero; fills ``final`` unless chunks are whole.

    Backwards in time, ``initial`` is the gradient of the final states and ``final`` that of the initial ones.
    """
    if chunks.whole:
        return initial
    H, P = u.shape[2:]
    N = v.shape[3]
    states = torch.empty(chunks.count, H, P, N, dtype=torch.float32, device=u.device)
    decay = torch.empty(chunks.count, H, dtype=torch.float32, device=u.device)
    walk_states(u, v, z, decays, chunks, tile, None, None, states, decay, backward)
    pass_states_kernel[(chunks.sequences, H, triton.cdiv(P * N, PASS_BLOCK))](
        states, decay, initial, final, H, P * N, *chunks.args, BLOCK=PASS_BLOCK, BACKWARD=backward, num_warps=4
    )
    return states
