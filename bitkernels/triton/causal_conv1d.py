"""Depthwise causal convolution over time, channels last.

A program goes along a strip of tokens, and of the last few keeps inputs, in the backward gradients too, in registers:
each is read once, and the convolution, which SiLU's gradient needs, computed once. A strip belongs to one sequence, and
kernels count tokens from its start.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.arguments import cdiv
from bitkernels.triton.elementwise import silu, silu_gradient
from bitkernels.triton.launch import Launch, layout, planned
from bitkernels.triton.mixer_arguments import (
    check_activation,
    check_convolution,
    check_floating,
    check_like,
    check_rank,
    check_taps,
)
from bitkernels.triton.ssd_states import Chunks, chunk_table

# Channels of a program, and of one of the step.
BLOCK_C = 256
STEP_BLOCK_C = 128
# Tokens of a program, and those whose loads are under way together.
FORWARD_STRIP, FORWARD_AT_ONCE = 32, 8
BACKWARD_STRIP, BACKWARD_AT_ONCE = 64, 4


@triton.jit
def strip_span(T, p_cu_seqlens, p_sequence, p_first):
    """Batch row, first token and length of the program's sequence, its number, and which of its strips this is."""
    i_strip = tl.program_id(0).to(tl.int64)
    if p_cu_seqlens is None:
        i_b = tl.program_id(2).to(tl.int64)
        return i_b, i_b * 0, T.to(tl.int64), i_b, i_strip
    else:
        i_seq = tl.load(p_sequence + i_strip)
        begin = tl.maximum(tl.load(p_cu_seqlens + i_seq).to(tl.int64), 0)
        end = tl.minimum(tl.load(p_cu_seqlens + i_seq + 1).to(tl.int64), T)
        return i_seq * 0, begin, end - begin, i_seq, i_strip - tl.load(p_first + i_seq)


@triton.jit
def load_input(
    p_x, p_initial, l, low, high, o_c, C, stride_x_t, stride_x_c, stride_i_w, stride_i_c, WIDTH: tl.constexpr
):  # fmt: skip
    """[BLOCK_C] the input of a token of the strip: of the history below ``low``, zero where there is none."""
    m_x = o_c < tl.where((l >= low) & (l < high), C, 0)
    x = tl.load(p_x + l * stride_x_t + o_c * stride_x_c, mask=m_x, other=0.0).to(tl.float32)
    if p_initial is not None:
        o_w = l - low + WIDTH - 1
        m_h = o_c < tl.where((l < low) & (o_w >= 0), C, 0)
        x += tl.load(p_initial + o_w * stride_i_w + o_c * stride_i_c, mask=m_h, other=0.0).to(tl.float32)
    return x


@triton.jit
def load_segment(p_seq_idx, l, low, high, stride_seq_t):
    """The sequence of a token of the strip; the history's is that of the first token."""
    if p_seq_idx is None:
        return 0
    else:
        l = tl.minimum(tl.maximum(l, low), high - 1)
        return tl.load(p_seq_idx + l * stride_seq_t, mask=high > low, other=0)


@triton.jit
def shifted(new, held, WIDTH: tl.constexpr):
    """The last WIDTH values, the newest first."""
    result = (new,)
    for back in tl.static_range(0, WIDTH - 1):
        result = result + (held[back],)
    return result


@triton.jit
def load_weight(p_weight, back: tl.constexpr, o_c, m_c, stride_w_c, stride_w_w, WIDTH: tl.constexpr):
    """[BLOCK_C] the weight of the input ``back`` tokens before."""
    return tl.load(p_weight + o_c * stride_w_c + (WIDTH - 1 - back) * stride_w_w, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def convolve(p_seq_idx, inputs, segments, weight, bias, WIDTH: tl.constexpr):
    """[BLOCK_C] the convolution at the newest of the inputs, before its activation."""
    y = bias
    for back in tl.static_range(0, WIDTH):
        tap = inputs[back]
        if p_seq_idx is not None:
            tap = tl.where(segments[back] == segments[0], tap, 0.0)
        y += tap * weight[back]
    return y


@triton.jit(do_not_specialize=["T"])
def causal_conv1d_kernel(
    p_x,  # [B, T, C]
    p_weight,  # [C, WIDTH]
    p_bias,  # [C] or None
    p_initial,  # [S, WIDTH - 1, C] or None
    p_seq_idx,  # [B, T] or None
    p_cu_seqlens,  # [S + 1] or None
    p_sequence,  # [strips] the sequence of each strip, or None
    p_first,  # [S + 1] the first strip of each sequence, or None
    p_y,  # [B, T, C] contiguous
    T,
    C,
    stride_x_b,
    stride_x_t,
    stride_x_c,
    stride_w_c,
    stride_w_w,
    stride_bias_c,
    stride_i_b,
    stride_i_w,
    stride_i_c,
    stride_seq_b,
    stride_seq_t,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    STRIP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b, first, length, i_seq, i_strip = strip_span(T, p_cu_seqlens, p_sequence, p_first)
    begin = i_strip * STRIP
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    # From here on tokens count from the strip's first, in 32 bits; those of the sequence are from low to high.
    low = tl.maximum(-begin, -WIDTH).to(tl.int32)
    high = tl.minimum(length - begin, STRIP).to(tl.int32)
    p_x += i_b * stride_x_b + (first + begin) * stride_x_t
    p_y += (i_b * T + first + begin) * C
    if p_initial is not None:
        p_initial += i_seq * stride_i_b
    if p_seq_idx is not None:
        p_seq_idx += i_b * stride_seq_b + (first + begin) * stride_seq_t

    bias = tl.zeros([BLOCK_C], tl.float32)
    if p_bias is not None:
        bias = tl.load(p_bias + o_c * stride_bias_c, mask=m_c, other=0.0).to(tl.float32)
    weight, inputs, segments = (), (), ()  # newest first
    for back in tl.static_range(0, WIDTH):
        weight = weight + (load_weight(p_weight, back, o_c, m_c, stride_w_c, stride_w_w, WIDTH),)
        inputs = inputs + (load_input(
            p_x, p_initial, -1 - back, low, high, o_c, C, stride_x_t, stride_x_c, stride_i_w, stride_i_c, WIDTH
        ),)  # fmt: skip
        segments = segments + (load_segment(p_seq_idx, -1 - back, low, high, stride_seq_t),)
    for i_step in range(0, tl.cdiv(high, AT_ONCE)):
        # Loads of some tokens are on their way before the first of them is needed.
        read, read_segment = (), ()
        for i in tl.static_range(0, AT_ONCE):
            l = i_step * AT_ONCE + i
            m_x = o_c < tl.where(l < high, C, 0)
            read = read + (tl.load(p_x + l * stride_x_t + o_c * stride_x_c, mask=m_x, other=0.0),)
            read_segment = read_segment + (load_segment(p_seq_idx, l, low, high, stride_seq_t),)
        for i in tl.static_range(0, AT_ONCE):
            l = i_step * AT_ONCE + i
            inputs = shifted(read[i].to(tl.float32), inputs, WIDTH)
            segments = shifted(read_segment[i], segments, WIDTH)
            y = convolve(p_seq_idx, inputs, segments, weight, bias, WIDTH)
            if SILU:
                y = silu(y)
            m_y = o_c < tl.where(l < high, C, 0)
            tl.store(p_y + l * C + o_c, y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["T"])
def causal_conv1d_backward_kernel(
    p_dy,  # [B, T, C]
    p_x,  # [B, T, C]
    p_weight,  # [C, WIDTH]
    p_bias,  # [C] or None
    p_initial,  # [S, WIDTH - 1, C] or None
    p_seq_idx,  # [B, T] or None
    p_cu_seqlens,  # [S + 1] or None
    p_sequence,  # [strips] the sequence of each strip, or None
    p_first,  # [S + 1] the first strip of each sequence, or None
    p_dx,  # [B, T, C], channels dense
    p_dweight,  # [strips of all rows, WIDTH, C] float32
    p_dbias,  # [strips of all rows, C] float32, or None
    p_dinitial,  # [S, WIDTH - 1, C] contiguous, or None
    T,
    C,
    stride_dy_b,
    stride_dy_t,
    stride_dy_c,
    stride_x_b,
    stride_x_t,
    stride_x_c,
    stride_dx_b,
    stride_dx_t,
    stride_w_c,
    stride_w_w,
    stride_bias_c,
    stride_i_b,
    stride_i_w,
    stride_i_c,
    stride_seq_b,
    stride_seq_t,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    STRIP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b, first, length, i_seq, i_strip = strip_span(T, p_cu_seqlens, p_sequence, p_first)
    i_row = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    begin = i_strip * STRIP
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if p_initial is not None:
        p_initial += i_seq * stride_i_b
        begin -= WIDTH - 1  # the strips begin with the history, whose gradients are computed like those of x
    # From here on tokens count from the strip's first, in 32 bits; those of the sequence are from low to high.
    low = tl.maximum(-begin, -WIDTH).to(tl.int32)
    high = tl.minimum(length - begin, STRIP + WIDTH).to(tl.int32)
    p_dy += i_b * stride_dy_b + (first + begin) * stride_dy_t
    p_x += i_b * stride_x_b + (first + begin) * stride_x_t
    p_dx += i_b * stride_dx_b + (first + begin) * stride_dx_t
    if p_seq_idx is not None:
        p_seq_idx += i_b * stride_seq_b + (first + begin) * stride_seq_t

    zero = tl.zeros([BLOCK_C], tl.float32)
    bias = zero
    if p_bias is not None:
        bias = tl.load(p_bias + o_c * stride_bias_c, mask=m_c, other=0.0).to(tl.float32)
    # Newest first: inputs, gradients before the activation, and the sequences they belong to.
    weight, inputs, gradients, segments, dweight = (), (), (), (), ()
    for back in tl.static_range(0, WIDTH):
        weight = weight + (load_weight(p_weight, back, o_c, m_c, stride_w_c, stride_w_w, WIDTH),)
        inputs = inputs + (load_input(
            p_x, p_initial, -1 - back, low, high, o_c, C, stride_x_t, stride_x_c, stride_i_w, stride_i_c, WIDTH
        ),)  # fmt: skip
        segments = segments + (load_segment(p_seq_idx, -1 - back, low, high, stride_seq_t),)
        gradients = gradients + (zero,)
        dweight = dweight + (zero,)
    dbias = zero
    for i_step in range(0, tl.cdiv(tl.minimum(high, STRIP) + WIDTH - 1, AT_ONCE)):
        # Loads of some tokens are on their way before the first of them is needed.
        read_x, read_dy, read_segment = (), (), ()
        for i in tl.static_range(0, AT_ONCE):
            l = i_step * AT_ONCE + i
            read_x = read_x + (load_input(
                p_x, p_initial, l, low, high, o_c, C, stride_x_t, stride_x_c, stride_i_w, stride_i_c, WIDTH
            ),)  # fmt: skip
            m_y = o_c < tl.where((l >= low) & (l < high), C, 0)
            read_dy = read_dy + (tl.load(p_dy + l * stride_dy_t + o_c * stride_dy_c, mask=m_y, other=0.0),)
            read_segment = read_segment + (load_segment(p_seq_idx, l, low, high, stride_seq_t),)
        for i in tl.static_range(0, AT_ONCE):
            l = i_step * AT_ONCE + i
            inputs = shifted(read_x[i], inputs, WIDTH)
            segments = shifted(read_segment[i], segments, WIDTH)
            y = convolve(p_seq_idx, inputs, segments, weight, bias, WIDTH)
            g = read_dy[i].to(tl.float32)
            if SILU:
                g *= silu_gradient(y)
            gradients = shifted(g, gradients, WIDTH)

            # What the strip adds up is of its own outputs; those after them belong to the next one.
            own = tl.where(l < STRIP, g, 0.0)
            sums = ()
            for back in tl.static_range(0, WIDTH):
                tap = inputs[back]
                if p_seq_idx is not None:
                    tap = tl.where(segments[back] == segments[0], tap, 0.0)
                sums = sums + (dweight[back] + own * tap,)
            dweight = sums
            dbias += own

            # Now the last of the outputs that read the input WIDTH - 1 tokens ago is known.
            l -= WIDTH - 1
            dx = zero
            for back in tl.static_range(0, WIDTH):
                later = gradients[back]
                if p_seq_idx is not None:
                    later = tl.where(segments[back] == segments[WIDTH - 1], later, 0.0)
                dx += later * weight[WIDTH - 1 - back]
            m_x = o_c < tl.where((l >= tl.maximum(low, 0)) & (l < tl.minimum(high, STRIP)), C, 0)
            tl.store(p_dx + l * stride_dx_t + o_c, dx.to(p_dx.dtype.element_ty), mask=m_x)
            if p_dinitial is not None:
                o_h = (i_seq * (WIDTH - 1) + l - low + WIDTH - 1) * C + o_c
                m_h = o_c < tl.where((l >= 0) & (l < low), C, 0)
                tl.store(p_dinitial + o_h, dx.to(p_dinitial.dtype.element_ty), mask=m_h)

    for back in tl.static_range(0, WIDTH):
        tl.store(p_dweight + (i_row * WIDTH + WIDTH - 1 - back) * C + o_c, dweight[back], mask=m_c)
    if p_dbias is not None:
        tl.store(p_dbias + i_row * C + o_c, dbias, mask=m_c)


@triton.jit
def causal_conv1d_step_kernel(
    p_state,  # [B, WIDTH - 1, C], shifted
    p_x,  # [B, C]
    p_weight,  # [C, WIDTH]
    p_bias,  # [C] or None
    p_y,  # [B, C] contiguous
    C,
    stride_s_b,
    stride_s_w,
    stride_s_c,
    stride_x_b,
    stride_x_c,
    stride_w_c,
    stride_w_w,
    stride_bias_c,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_state += i_b * stride_s_b + o_c * stride_s_c
    p_weight += o_c * stride_w_c
    x = tl.load(p_x + i_b * stride_x_b + o_c * stride_x_c, mask=m_c, other=0.0)
    y = x.to(tl.float32) * tl.load(p_weight + (WIDTH - 1) * stride_w_w, mask=m_c, other=0.0).to(tl.float32)
    if p_bias is not None:
        y += tl.load(p_bias + o_c * stride_bias_c, mask=m_c, other=0.0).to(tl.float32)
    for w in tl.static_range(0, WIDTH - 1):
        tap = tl.load(p_state + w * stride_s_w, mask=m_c, other=0.0)
        y += tap.to(tl.float32) * tl.load(p_weight + w * stride_w_w, mask=m_c, other=0.0).to(tl.float32)
        if w > 0:
            tl.store(p_state + (w - 1) * stride_s_w, tap, mask=m_c)
    if WIDTH > 1:
        tl.store(p_state + (WIDTH - 2) * stride_s_w, x.to(p_state.dtype.element_ty), mask=m_c)
    if SILU:
        y = silu(y)
    tl.store(p_y + i_b * C + o_c, y.to(p_y.dtype.element_ty), mask=m_c)


def _shared_strides(weight: Tensor, bias: Tensor | None, initial: Tensor | None, seq_idx: Tensor | None) -> tuple:
    return (
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        *((0, 0, 0) if initial is None else initial.stride()),
        *((0, 0) if seq_idx is None else seq_idx.stride()),
    )


def _strips(T: int, packed: bool, sequences: int, length: int, history: int = 0) -> tuple[int, int]:
    """Strips of ``length`` tokens of a row, and rows, where every sequence is longer by ``history``."""
    if not packed:
        return cdiv(T + history, length), sequences
    # An upper bound, so that nothing waits for the device.
    return cdiv(T + sequences * history, length) + sequences, 1


def _table(T: int, strips: int, cu_seqlens: Tensor | None, sequences: int, length: int, history: int = 0) -> tuple:
    """What ``strip_span`` reads."""
    if cu_seqlens is None:
        return None, None, None
    ends = cu_seqlens + history * torch.arange(sequences + 1, device=cu_seqlens.device)
    _, sequence, first = chunk_table(Chunks(T, length, length, strips, sequences, packed=True), ends)
    return cu_seqlens.contiguous(), sequence, first


class ConvolutionPlan:
    """Checks arguments and plans the launch for them; call: the convolution."""

    def __init__(self, x, weight, bias, initial_state, seq_idx, cu_seqlens, silu):
        self.sequences = check_convolution("causal_conv1d", x, weight, bias, initial_state, seq_idx, cu_seqlens)
        if x.numel() == 0:
            return
        T, C = x.shape[1:]
        self.strips, rows = _strips(T, cu_seqlens is not None, self.sequences, FORWARD_STRIP)
        self.launch = Launch(
            causal_conv1d_kernel, (self.strips, cdiv(C, BLOCK_C), rows), T, C, *x.stride(),
            *_shared_strides(weight, bias, initial_state, seq_idx), weight.shape[1], silu, FORWARD_STRIP,
            FORWARD_AT_ONCE, BLOCK_C, num_warps=2,
        )  # fmt: skip

    def __call__(self, x, weight, bias, initial_state, seq_idx, cu_seqlens) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.numel() > 0:
            table = _table(x.shape[1], self.strips, cu_seqlens, self.sequences, FORWARD_STRIP)
            self.launch(x, weight, bias, initial_state, seq_idx, *table, y)
        return y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """``bitkernels::causal_conv1d``."""
    tensors = x, weight, bias, initial_state, seq_idx, cu_seqlens
    plan = planned(("causal_conv1d", silu, *map(layout, tensors)), lambda: ConvolutionPlan(*tensors, silu))
    return plan(*tensors)


def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = True,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``bitkernels::causal_conv1d_backward``; ``dx`` is where that gradient is to be, perhaps a slice."""
    op = "causal_conv1d_backward"
    sequences = check_convolution(op, x, weight, bias, initial_state, seq_idx, cu_seqlens)
    check_like(op, "dy", dy, x, tuple(x.shape))
    T, C = x.shape[1:]
    width = weight.shape[1]
    fresh = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    if initial_state is None:
        dinitial = torch.empty(0, **fresh)
    else:
        dinitial = torch.empty(initial_state.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        dbias = torch.empty(0, **fresh) if bias is None else torch.zeros(C, **fresh)
        return dx, torch.zeros(C, width, **fresh), dbias, dinitial.zero_()
    history = 0 if initial_state is None else width - 1
    strips, rows = _strips(T, cu_seqlens is not None, sequences, BACKWARD_STRIP, history)
    table = _table(T, strips, cu_seqlens, sequences, BACKWARD_STRIP, history)
    dweight = torch.empty(rows * strips, width, C, **fresh)
    dbias = None if bias is None else torch.empty(rows * strips, C, **fresh)
    causal_conv1d_backward_kernel[(strips, cdiv(C, BLOCK_C), rows)](
        dy, x, weight, bias, initial_state, seq_idx, *table, dx, dweight, dbias,
        None if initial_state is None else dinitial, T, C,
        *dy.stride(), *x.stride(), *dx.stride()[:2], *_shared_strides(weight, bias, initial_state, seq_idx),
        WIDTH=width, SILU=silu, STRIP=BACKWARD_STRIP, AT_ONCE=BACKWARD_AT_ONCE, BLOCK_C=BLOCK_C, num_warps=2,
    )  # fmt: skip
    return dx, dweight.sum(0).T.contiguous(), torch.empty(0, **fresh) if dbias is None else dbias.sum(0), dinitial


def causal_conv1d_step(
    conv_state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True
) -> Tensor:
    """``bitkernels::causal_conv1d_step``."""
    op = "causal_conv1d_step"
    check_activation(op, "x", x)
    check_rank(op, "x", x, "[B, C]")
    check_taps(op, x, weight, bias)
    batch, C = x.shape
    check_floating(op, "conv_state", conv_state, x, (batch, weight.shape[1] - 1, C))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    causal_conv1d_step_kernel[(batch, triton.cdiv(C, STEP_BLOCK_C))](
        conv_state, x, weight, bias, y, C,
        *conv_state.stride(), *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
        WIDTH=weight.shape[1], SILU=silu, BLOCK_C=STEP_BLOCK_C, num_warps=4,
    )  # fmt: skip
    return y
