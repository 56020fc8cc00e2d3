"""What the kernels of the SSD scan share: the division of time, tiles, step sizes and decays.

Time is divided twice. A *block* of 16 to 64 tokens is the unit of matrix work: inside it the scan is a masked
attention-like product. A *chunk* is a run of blocks that one program walks through with the state in registers, so
states reach memory only at chunk boundaries. Chunks never straddle sequences, and are as long as the number of
programs allows: with enough heads and batch, one chunk is a whole sequence.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.arguments import MAX_SIZE, cdiv, next_power_of_2
from bitkernels.triton.elementwise import step_size
from bitkernels.triton.launch import Launch

# Programs that run at once: registers hold two for each multiprocessor, of a large GPU here.
SLOTS = 264
MAX_CHUNKS = 16
STEPS_BLOCK_H = 16
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tile:
    """How much of each axis a program holds; products need at least 16."""

    time: int
    headdim: int
    state: int
    warps: int


@cache
def scan_tile(dtype: torch.dtype, P: int, N: int) -> Tile:
    """Registers hold a float32 state [headdim, state] and a [time, headdim] output.

    Four warps are one warpgroup, and its products have 64 rows: more warps would repeat each other's work.
    """
    state = max(16, next_power_of_2(N))
    headdim = max(16, next_power_of_2(P))
    if dtype == torch.float32:
        return Tile(16, min(headdim, 32 if state <= 128 else 16), state, 8)
    return Tile(64, min(headdim, 64), state, 4) if state <= 128 else Tile(64, min(headdim, 32), state, 8)


@dataclass(frozen=True)
class Chunks:
    """The division of [B, T] tokens into chunks of ``length`` (a multiple of the block), see ``chunk_span``."""

    T: int
    length: int
    block: int
    count: int  # with cu_seqlens an upper bound, so that nothing waits for the device
    sequences: int
    packed: bool  # into one batch row, by cu_seqlens

    @property
    def blocks(self) -> int:
        """Blocks in all chunks, those past the end of their chunk among them."""
        return self.count * self.per_chunk

    @property
    def per_chunk(self) -> int:
        return self.length // self.block

    @property
    def whole(self) -> bool:
        """Every chunk is a whole sequence: nothing has to be passed between chunks."""
        return not self.packed and self.count == self.sequences


def chunks_of(programs: int, blocks: int) -> int:
    """Into how many chunks to divide a row of blocks, where each takes a number of programs in every row at once."""

    def time(count: int) -> int:
        """In blocks: what a program walks in each round. Several chunks are walked twice, and states passed on."""
        rounds = cdiv(programs * count, SLOTS)
        return rounds * cdiv(blocks, count) * (1 if count == 1 else 2) + count

    return min(range(1, min(blocks, MAX_CHUNKS) + 1), key=time)


def divide(x: Tensor, packed: int | None, tile: Tile, programs: int) -> Chunks:
    """For a number of programs a chunk and tile of P. ``packed``: how many sequences a batch row holds, None if one."""
    batch, T, _, P = x.shape
    blocks = cdiv(T, tile.time)
    count = chunks_of(batch * programs * cdiv(P, tile.headdim), blocks)
    length = tile.time * cdiv(blocks, count)
    if packed is not None:
        return Chunks(T, length, tile.time, cdiv(T, length) + packed, packed, True)
    return Chunks(T, length, tile.time, batch * cdiv(T, length), batch, False)


def chunk_table(chunks: Chunks, cu_seqlens: Tensor | None) -> tuple[Tensor | None, ...]:
    """What ``chunk_span`` reads: cu_seqlens, int64 [count] the sequence of each chunk, and int64 [sequences + 1] the
    first chunk of each sequence.
    """
    if cu_seqlens is None:
        return None, None, None
    first = torch.zeros(chunks.sequences + 1, dtype=torch.int64, device=cu_seqlens.device)
    torch.cumsum((cu_seqlens.diff().clamp_(min=0) + (chunks.length - 1)) // chunks.length, 0, out=first[1:])
    first.clamp_(max=chunks.count)  # like the bounds in chunk_span: no cu_seqlens leads outside of x
    # Chunks past the last sequence fall into it and find themselves empty.
    numbers = torch.arange(chunks.count, device=cu_seqlens.device)
    sequence = torch.searchsorted(first[1:], numbers, right=True).clamp_(max=chunks.sequences - 1)
    return cu_seqlens, sequence, first


def segments_within(seq_idx: Tensor | None, cu_seqlens: Tensor) -> Tensor | None:
    """``seq_idx`` without the changes at the starts of sequences: those keep their initial states."""
    if seq_idx is None:
        return None
    # One place past the end, where an empty last sequence starts.
    changes = F.pad(seq_idx.diff(dim=1) != 0, (1, 1))
    return changes.index_fill_(1, cu_seqlens[:-1].long(), False).cumsum(1, dtype=torch.int32)[:, :-1]


def dense(t: Tensor) -> Tensor:
    """With a dense last axis, and tokens near enough for 32-bit offsets within a block."""
    return t if t.stride(3) == 1 and t.stride(1) < MAX_SIZE else t.contiguous()


def dense_inputs(x, B, C, z, seq_idx, cu_seqlens) -> tuple:
    """As the kernels read them."""
    if cu_seqlens is not None:
        cu_seqlens, seq_idx = cu_seqlens.contiguous(), segments_within(seq_idx, cu_seqlens)
    return dense(x), dense(B), dense(C), None if z is None else dense(z), seq_idx, cu_seqlens


def token_strides(*tensors: Tensor | None) -> tuple:
    """Of batch, token and head, one tensor after the other."""
    return tuple(stride for t in tensors for stride in ((0, 0, 0) if t is None else t.stride()[:3]))


def pair_strides(t: Tensor | None) -> tuple:
    """Of D or seq_idx, whose second axis may be missing."""
    return (0, 0) if t is None else (*t.stride(), 0)[:2]


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
    """Batch row, first token and number of tokens of a block."""
    blocks = chunk_length // BLOCK_T
    i_b, begin, length = chunk_span(i_block // blocks, T, chunk_length, p_cu_seqlens, p_sequence, p_first)
    offset = (i_block % blocks).to(tl.int32) * BLOCK_T
    return i_b, begin + offset, tl.minimum(tl.maximum(length - offset, 0), BLOCK_T)


@triton.jit
def columns(i_tile, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a tile's columns, and which of them are there; the compiler drops a constant mask."""
    o = i_tile * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    if SIZE % BLOCK == 0:
        m = tl.full([BLOCK], 1, tl.int1)
    return o, m


@triton.jit
def load_tile(p_tile, stride_row, o_row, m_row, o_col, m_col):
    """[rows, columns] of tokens, zero where masked."""
    o_tile = o_row[:, None] * stride_row + o_col[None, :]
    return tl.load(p_tile + o_tile, mask=m_row[:, None] & m_col[None, :], other=0.0)


@triton.jit
def load_decays(p_total, p_low, i_row, BLOCK_T: tl.constexpr):
    """[BLOCK_T] log2 decays since the block began, what float32 loses of them, and those from there to its end."""
    o = i_row * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.load(p_total + o)
    to_end = tl.load(p_total + i_row * BLOCK_T + BLOCK_T - 1) - total
    low = total
    if p_low is not None:
        low = tl.load(p_low + o)
        to_end += tl.load(p_low + i_row * BLOCK_T + BLOCK_T - 1) - low
    return total, low, to_end


@triton.jit
def pair_decay(total, low, reaches, p_low):
    """[BLOCK_T, BLOCK_T] what is left at token i of what token j brought; the exponent is masked, never positive."""
    exponent = total[:, None] - total[None, :]
    if p_low is not None:
        exponent += low[:, None] - low[None, :]
    return tl.exp2(tl.where(reaches, exponent, -float("inf")))


@triton.jit
def load_segments(p_seq_idx, stride_t, o_t, m_t):
    """[BLOCK_T] how often the sequence has changed since the token before the block."""
    m_before = m_t & (o_t > 0)
    here = tl.load(p_seq_idx + o_t * stride_t, mask=m_before, other=0)
    before = tl.load(p_seq_idx + (o_t - 1) * stride_t, mask=m_before, other=0)
    return tl.cumsum((here != before).to(tl.int32), 0)


@triton.jit(do_not_specialize=["T", "chunk_length"])
def steps_kernel(
    p_dt,  # [B, T, H]
    p_A,  # [H]
    p_dt_bias,  # [H] or None
    p_step,  # [blocks, H, BLOCK_T] float32 receives the step sizes, zero past the end
    p_total,  # [blocks, H, BLOCK_T] float32 receives the log2 decays since the block began
    p_low,  # [blocks, H, BLOCK_T] float32 receives what float32 loses of them, or None
    p_cu_seqlens,
    p_sequence,
    p_first,
    H,
    T,
    chunk_length,
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
    i_block = tl.program_id(0).to(tl.int64)
    i_b, begin, count = block_span(i_block, T, chunk_length, p_cu_seqlens, p_sequence, p_first, BLOCK_T)
    o_i = tl.arange(0, BLOCK_T)
    o_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    p_dt += i_b * stride_dt_b + begin * stride_dt_t
    o_dt = o_i.to(tl.int64)[:, None] * stride_dt_t + o_h[None, :] * stride_dt_h
    dt = tl.load(p_dt + o_dt, mask=(o_i < count)[:, None] & m_h[None, :], other=0.0).to(tl.float32)
    if p_dt_bias is not None:
        dt += tl.load(p_dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    step = tl.where((o_i < count)[:, None], step_size(dt, dt_min, dt_max, SOFTPLUS, CLAMP), 0.0)
    A = tl.load(p_A + o_h, mask=m_h, other=0.0)
    if p_low is None:
        total = tl.cumsum(step * (A.to(tl.float32) * LOG2_E)[None, :], 0)
    else:
        exact = tl.cumsum(step.to(tl.float64) * (A.to(tl.float64) * LOG2_E)[None, :], 0)
        total = exact.to(tl.float32)
    o_out = (i_block * H + o_h)[None, :] * BLOCK_T + o_i[:, None]
    tl.store(p_step + o_out, step, mask=m_h[None, :])
    tl.store(p_total + o_out, total, mask=m_h[None, :])
    if p_low is not None:
        tl.store(p_low + o_out, (exact - total.to(tl.float64)).to(tl.float32), mask=m_h[None, :])


class Decays:
    """Plans the step sizes of a call and the decays they give; call: [step, total, low] as of ``steps_kernel``.

    A step of 10 with A = -16 adds -160 to a running sum; the differences of such sums that decay little are then good
    to about 1e-5 only. ``exact`` keeps them as pairs of float32, which float32 results need and 16-bit ones do not.
    """

    def __init__(self, dt: Tensor, chunks: Chunks, exact: bool, limits: tuple, flags: dict):
        H = dt.shape[2]
        self.shape, self.exact = (chunks.blocks, H, chunks.block), exact
        self.launch = Launch(
            steps_kernel, (chunks.blocks, cdiv(H, STEPS_BLOCK_H), 1), H, chunks.T, chunks.length, *dt.stride(),
            *limits, chunks.block, STEPS_BLOCK_H, *flags.values(), num_warps=4,
        )  # fmt: skip

    def __call__(self, dt: Tensor, A: Tensor, dt_bias: Tensor | None, table: tuple) -> tuple[Tensor | None, ...]:
        step = torch.empty(self.shape, dtype=torch.float32, device=dt.device)
        total = torch.empty_like(step)
        low = torch.empty_like(step) if self.exact else None
        self.launch(dt, A, dt_bias, step, total, low, *table)
        return step, total, low


def precision_of(dtype: torch.dtype) -> str:
    """Three TF32 products hold a float32 product to about 1e-6; 16-bit operands ignore this."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
