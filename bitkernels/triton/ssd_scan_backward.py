"""Gradients of the SSD scan.

With h the state before a block and dh the gradient of the state after it, all gradients of a block follow without any
other block. So two walks leave h and dh of every block in memory (in the type of x, as operands of products), and two
kernels do the rest, all blocks in parallel: one goes through heads, and leaves for ``ssd_group_gradients`` the sum
over heads of the gradient of C B^T. Parts of sums that several programs hold are added in a fixed order.

Time is taken in parts, so that h and dh take a bounded amount of memory.

The gradient of the decay between tokens k - 1 and k is the sum of all that crosses it, taken directly: differences of
running sums would lose the small gradients of strong decays.

On Hopper GPUs the usual case goes to CUDA C++, which divides the work in the same way, before it comes here; see
``ssd_hopper``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.arguments import cdiv
from bitkernels.triton.elementwise import silu, silu_gradient, step_options, step_size
from bitkernels.triton.launch import Launch, layout, planned
from bitkernels.triton.mixer_arguments import check_backward
from bitkernels.triton.ssd_group_gradients import plan_group_gradients
from bitkernels.triton.ssd_states import (
    SLOTS,
    Decays,
    block_span,
    chunk_table,
    columns,
    dense,
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
from bitkernels.triton.ssd_walk import EnterChunks, plan_walk, walk_heads

# Two rounds of programs: heads are spread no further.
MAX_PROGRAMS = 2 * SLOTS
# Of h and dh, together.
STATE_BYTES = 2**28
# Loads ahead would leave shared memory for one program a multiprocessor.
STAGES = 1


def head_splits(programs: int, heads: int) -> int:
    """Over how many programs to spread the heads of a group: as few as take the least time, since each leaves a sum."""

    def time(splits: int) -> int:
        """In heads: what a program goes through in each round."""
        return cdiv(programs * splits, SLOTS) * cdiv(heads, splits)

    return min(range(1, min(heads, cdiv(MAX_PROGRAMS, programs)) + 1), key=time)


@triton.jit
def pair_gradients(dCB, dweights, CB, dt, total, low, reached, p_low, PRECISION: tl.constexpr):
    """From the gradient of the weights [j, i] of a block's pairs: dCB with theirs, ddt and ddecay [BLOCK_T].

    Decay k counts for every pair j < k <= i.
    """
    o = tl.arange(0, dCB.shape[0])
    dweights *= pair_decay(-total, -low, reached, p_low)
    dCB += dweights * dt[:, None]
    dweights *= CB
    ddt = tl.sum(dweights, 1)
    at_or_before = (o[:, None] >= o[None, :]).to(tl.float32)  # [i, k]
    pairs = tl.dot(dweights * dt[:, None], at_or_before, input_precision=PRECISION)  # [j, k]
    return dCB, ddt, tl.sum(tl.where(o[:, None] < o[None, :], pairs, 0.0), 0)


@triton.jit(do_not_specialize=["first_block", "splits", "T", "chunk_length"])
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
    p_step,  # [blocks, H, BLOCK_T]
    p_total,  # [blocks, H, BLOCK_T]
    p_low,  # [blocks, H, BLOCK_T] or None
    p_seq_idx,  # [B, T] or None
    p_h,  # [blocks of the part, H, P, N] the state before each block
    p_dh,  # [blocks of the part, H, P, N] the gradient of the state after it
    p_dx,  # [B, T, H, P] contiguous
    p_dz,  # [B, T, H, P] contiguous, or None
    p_ddt,  # [B, T, H] contiguous
    p_dCB,  # [blocks of the part, G, splits, BLOCK_T, BLOCK_T] float32, of (C B^T)^T
    p_heads,  # [blocks, H, HEAD_SUMS] float32: parts of the gradients of A, dt_bias and D
    p_cu_seqlens,
    p_sequence,
    p_first,
    first_block,
    splits,  # programs the heads of a group are spread over
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
    stride_D_h,
    stride_D_p,
    stride_dt_b,
    stride_dt_t,
    stride_dt_h,
    stride_seq_b,
    stride_seq_t,
    dt_min,
    dt_max,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEAD_SUMS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_part = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1).to(tl.int64)
    i_g = tl.program_id(2).to(tl.int64)
    i_block = first_block + i_part
    i_b, first, count = block_span(i_block, T, chunk_length, p_cu_seqlens, p_sequence, p_first, BLOCK_T)
    if count == 0:  # past the end of its chunk, where the walks left nothing
        return
    o_i = tl.arange(0, BLOCK_T)
    m_t = o_i < count
    o_n, m_n = columns(0, N, BLOCK_N)

    p_x += i_b * stride_x_b + first * stride_x_t
    p_dy += i_b * stride_dy_b + first * stride_dy_t
    p_dx += (i_b * T + first) * H * P
    if p_z is not None:
        p_z += i_b * stride_z_b + first * stride_z_t
        p_dz += (i_b * T + first) * H * P
    p_B += i_b * stride_B_b + first * stride_B_t + i_g * stride_B_g
    p_C += i_b * stride_C_b + first * stride_C_t + i_g * stride_C_g
    b_B = load_tile(p_B, stride_B_t, o_i, m_t, o_n, m_n)
    b_C = load_tile(p_C, stride_C_t, o_i, m_t, o_n, m_n)
    # Pairs of tokens are [j, i] here, so that their products are left operands and stay in registers.
    CB = tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION)
    reached = o_i[:, None] <= o_i[None, :]
    if p_seq_idx is not None:
        segment = load_segments(p_seq_idx + i_b * stride_seq_b, stride_seq_t, first + o_i, m_t)
        last_segment = tl.max(segment, 0)
        reached = reached & (segment[:, None] == segment[None, :])

    dCB = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    heads = tl.cdiv(HEADS_PER_GROUP, splits)
    for i_head in range(i_split * heads, tl.minimum(i_split * heads + heads, HEADS_PER_GROUP)):
        i_h = i_g * HEADS_PER_GROUP + i_head
        i_row = i_block * H + i_h
        o_states = (i_part * H + i_h) * P * N
        dt = tl.load(p_step + i_row * BLOCK_T + o_i)
        total, low, to_end = load_decays(p_total, p_low, i_row, BLOCK_T)
        kept = tl.exp2(tl.load(p_total + i_row * BLOCK_T + BLOCK_T - 1))
        from_enter = tl.exp2(total)
        to_leave = tl.exp2(to_end)
        if p_seq_idx is not None:
            kept = tl.where(last_segment == 0, kept, 0.0)
            from_enter = tl.where(segment == 0, from_enter, 0.0)
            to_leave = tl.where(segment == last_segment, to_leave, 0.0)
        weights = (CB * pair_decay(-total, -low, reached, p_low) * dt[:, None]).to(b_B.dtype)

        dweights = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)  # x_j dy_i
        through_enter = tl.zeros([BLOCK_T], tl.float32)  # what the entering state gave y_i, times dy_i
        through_leave = tl.zeros([BLOCK_T], tl.float32)  # what token j gave the leaving state, times dh, without dt_j
        ddt = tl.zeros([BLOCK_T], tl.float32)
        ddecay = tl.zeros([BLOCK_T], tl.float32)
        through_both = 0.0  # what the entering state gave the leaving one, times dh
        dD = 0.0
        for i_p in range(0, TILES):
            o_p, m_p = columns(i_p, P, BLOCK_P)
            m_tile = m_t[:, None] & m_p[None, :]
            o_tile = o_i[:, None] * (H * P) + o_p[None, :]
            o_state = o_p[:, None] * N + o_n[None, :]
            m_state = m_p[:, None] & m_n[None, :]
            b_x = load_tile(p_x + i_h * stride_x_h, stride_x_t, o_i, m_t, o_p, m_p)
            b_dy = load_tile(p_dy + i_h * stride_dy_h, stride_dy_t, o_i, m_t, o_p, m_p)
            x = b_x.to(tl.float32)
            dy = b_dy.to(tl.float32)
            if p_z is not None:
                z = load_tile(p_z + i_h * stride_z_h, stride_z_t, o_i, m_t, o_p, m_p).to(tl.float32)
                dz = dy * silu_gradient(z)
                dy *= silu(z)
                b_dy = dy.to(b_x.dtype)
            dweights = tl.dot(b_x, tl.trans(b_dy), dweights, input_precision=PRECISION)
            if TILES == 1:  # at once, as its operands take many registers
                dCB, ddt, ddecay = pair_gradients(dCB, dweights, CB, dt, total, low, reached, p_low, PRECISION)

            b_h = tl.load(p_h + o_states + o_state, mask=m_state, other=0.0)
            y = tl.dot(b_C, tl.trans(b_h), input_precision=PRECISION) * from_enter[:, None]
            through_enter += tl.sum(dy * y, 1)
            b_dh = tl.load(p_dh + o_states + o_state, mask=m_state, other=0.0)
            through_both += tl.sum(tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1), 0)
            dx = tl.dot(b_B, tl.trans(b_dh), input_precision=PRECISION) * to_leave[:, None]
            through_leave += tl.sum(dx * x, 1)
            dx = tl.dot(weights, b_dy, dx * dt[:, None], input_precision=PRECISION)
            if p_D is not None:
                D = tl.load(p_D + i_h * stride_D_h + o_p * stride_D_p, mask=m_p, other=0.0).to(tl.float32)
                dx += D[None, :] * dy
                if HEAD_SUMS > 3:
                    tl.store(p_heads + i_row * HEAD_SUMS + 2 + o_p, tl.sum(dy * x, 0), mask=m_p)
                else:
                    dD += tl.sum(tl.sum(dy * x, 1), 0)
            tl.store(p_dx + i_h * P + o_tile, dx.to(p_dx.dtype.element_ty), mask=m_tile)
            if p_z is not None:
                y = tl.dot(tl.trans(weights), b_x, y, input_precision=PRECISION)
                if p_D is not None:
                    y += D[None, :] * x
                tl.store(p_dz + i_h * P + o_tile, (dz * y).to(p_dz.dtype.element_ty), mask=m_tile)
        if TILES > 1:
            dCB, ddt, ddecay = pair_gradients(dCB, dweights, CB, dt, total, low, reached, p_low, PRECISION)

        # Of decay k, besides pairs: what tokens j < k gave the leaving state, and the entering state y_i from i = k on.
        crossing = tl.where(o_i[:, None] < o_i[None, :], (through_leave * dt)[:, None], through_enter[:, None])
        ddecay += tl.sum(crossing, 0) + kept * through_both
        tl.store(p_heads + i_row * HEAD_SUMS, tl.sum(ddecay * dt, 0))
        ddt += through_leave + ddecay * tl.load(p_A + i_h).to(tl.float32)
        o_dt = i_b * stride_dt_b + first * stride_dt_t + i_h * stride_dt_h + o_i.to(tl.int64) * stride_dt_t
        raw = tl.load(p_dt + o_dt, mask=m_t, other=0.0).to(tl.float32)
        if p_dt_bias is not None:
            raw += tl.load(p_dt_bias + i_h).to(tl.float32)
        if CLAMP:
            unclamped = step_size(raw, dt_min, dt_max, SOFTPLUS, False)
            ddt = tl.where((unclamped >= dt_min) & (unclamped <= dt_max), ddt, 0.0)
        if SOFTPLUS:
            ddt *= tl.sigmoid(raw)
        o_ddt = (i_b * T + first + o_i) * H + i_h
        tl.store(p_ddt + o_ddt, ddt.to(p_ddt.dtype.element_ty), mask=m_t)
        tl.store(p_heads + i_row * HEAD_SUMS + 1, tl.sum(tl.where(m_t, ddt, 0.0), 0))
        if HEAD_SUMS == 3:
            tl.store(p_heads + i_row * HEAD_SUMS + 2, dD)

    o_pair = o_i[:, None] * BLOCK_T + o_i[None, :]
    i_sum = (i_part * (H // HEADS_PER_GROUP) + i_g) * splits + i_split
    tl.store(p_dCB + i_sum * BLOCK_T * BLOCK_T + o_pair, dCB)


class BackwardPlan:
    """Checks arguments and plans the launches for them; call: the gradients."""

    def __init__(
        self, dy, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus,
        dt_min, dt_max, chunk_size,
    ):  # fmt: skip
        sequences = check_backward(
            dy, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_min, dt_max,
            chunk_size,
        )  # fmt: skip
        if x.numel() == 0:
            return
        H, P = x.shape[2:]
        G, N = B.shape[2:]
        dy = dense(dy)
        x, B, C, z, seq_idx, cu_seqlens = dense_inputs(x, B, C, z, seq_idx, cu_seqlens)
        tile = scan_tile(x.dtype, P, N)
        programs = 2 * H // walk_heads(x, B, z, tile)
        self.chunks = chunks = divide(x, None if cu_seqlens is None else sequences, tile, programs)
        limits, flags = step_options(dt_softplus, dt_min, dt_max)
        self.decays = Decays(dt, chunks, x.dtype == torch.float32, limits, flags)
        self.enter = EnterChunks(x, B, dy, C, z, seq_idx, chunks, tile)

        length = max(1, STATE_BYTES // (2 * chunks.per_chunk * H * P * N * x.element_size()))
        self.length = cdiv(chunks.count, cdiv(chunks.count, length))
        blocks = self.length * chunks.per_chunk
        splits, out_splits = head_splits(blocks * G, H // G), head_splits(2 * blocks * G, H // G)
        self.state_shape, self.pair_shape = (blocks, H, P, N), (blocks, G, splits, tile.time, tile.time)
        self.out_splits = out_splits
        self.head_sums = 2 if D is None else 3 if D.dim() == 1 else 2 + P
        self.walk, self.gradients, self.groups = {}, {}, {}
        for part in self.parts():
            count = len(part)
            self.walk[count] = plan_walk(x, B, dy, C, z, seq_idx, chunks, tile, count)
            self.gradients[count] = Launch(
                ssd_scan_backward_kernel, (count * chunks.per_chunk, splits, G), splits, H, chunks.T, chunks.length,
                *token_strides(dy, x, B, C, z), *pair_strides(D), *dt.stride(), *pair_strides(seq_idx), *limits,
                P, N, H // G, self.head_sums, cdiv(P, tile.headdim), tile.time, tile.headdim, tile.state,
                *flags.values(), precision_of(x.dtype), num_warps=tile.warps, num_stages=STAGES,
            )  # fmt: skip
            self.groups[count] = plan_group_gradients(
                dy, x, B, C, z, seq_idx, chunks, tile, count * chunks.per_chunk, out_splits, splits
            )

    def parts(self) -> list[range]:
        """Chunks whose h and dh are held at once."""
        count = self.chunks.count
        return [range(i, min(i + self.length, count)) for i in range(0, count, self.length)]

    def __call__(
        self, dy, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens
    ) -> tuple[Tensor, ...]:
        dy = dense(dy)

        def fresh(shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=x.device)

        initial = None if initial_states is None else initial_states.contiguous()
        dfinal = None if dfinal_states is None else dfinal_states.contiguous()
        dinitial = None if initial is None else fresh(initial.shape)
        x, B, C, z, seq_idx, cu_seqlens = dense_inputs(x, B, C, z, seq_idx, cu_seqlens)
        A, dt_bias = A.contiguous(), None if dt_bias is None else dt_bias.contiguous()
        table = chunk_table(self.chunks, cu_seqlens)
        decays = self.decays(dt, A, dt_bias, table)
        enter, leave = self.enter(x, B, dy, C, z, decays, seq_idx, table, initial, None, dfinal, dinitial)

        dx, ddt = fresh(x.shape, x.dtype), fresh(dt.shape, dt.dtype)
        dz = None if z is None else fresh(z.shape, x.dtype)
        h, dh = fresh(self.state_shape, x.dtype), fresh(self.state_shape, x.dtype)
        dCB = fresh(self.pair_shape)
        # Outputs share no memory, as torch requires of operators.
        splits = self.out_splits
        dB, dC = (fresh((splits, *B.shape), B.dtype if splits == 1 else torch.float32) for _ in range(2))
        # Zeros, as blocks past the end of their chunk add nothing.
        sums = torch.zeros(self.chunks.blocks, dt.shape[2], self.head_sums, dtype=torch.float32, device=x.device)
        last = dinitial if self.chunks.whole else None
        for part in self.parts():
            count, first, first_block = len(part), part.start, part.start * self.chunks.per_chunk
            self.walk[count](x, B, dy, C, z, *decays, seq_idx, enter, h, None, leave, dh, last, None, *table, first)
            self.gradients[count](
                dy, x, B, C, D, z, dt, A, dt_bias, *decays, seq_idx, h, dh, dx, dz, ddt, dCB, sums, *table, first_block
            )
            self.groups[count](dy, x, B, C, z, *decays, seq_idx, h, dh, dCB, dB, dC, *table, first_block)
        dB, dC = (t[0] if splits == 1 else t.sum(0).to(B.dtype) for t in (dB, dC))
        dA = sums[..., 0].sum(0)
        ddt_bias = None if dt_bias is None else sums[..., 1].sum(0)
        dD = None if D is None else sums[..., 2:].sum(0).view(D.shape)
        given = dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial
        return tuple(fresh(0) if t is None else t for t in given)


def no_tokens(dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states) -> tuple[Tensor, ...]:
    """The gradients where there is nothing to scan."""

    def zeros(t, dtype=torch.float32):
        return torch.zeros(0 if t is None else t.shape, dtype=dtype, device=x.device)

    dinitial = zeros(initial_states)
    if initial_states is not None and dfinal_states is not None:
        dinitial.copy_(dfinal_states)
    return (
        zeros(x, x.dtype), zeros(dt, dt.dtype), zeros(A), zeros(B, B.dtype), zeros(C, C.dtype), zeros(D),
        zeros(z, torch.float32 if z is None else z.dtype), zeros(dt_bias), dinitial,
    )  # fmt: skip


def backward_by_chunks(tensors: tuple, options: tuple) -> tuple[Tensor, ...]:
    """``bitkernels::ssd_scan_backward``, of its tensors and options: recomputes the states, which no forward stores."""
    plan = planned(("ssd_scan_backward", options, *map(layout, tensors)), lambda: BackwardPlan(*tensors, *options))
    return plan(*tensors) if tensors[2].numel() > 0 else no_tokens(*tensors[1:11])
