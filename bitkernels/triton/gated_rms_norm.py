"""``RMSNorm(x * silu(z)) * weight``, a group of a row in one program's registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.elementwise import silu, silu_gradient
from bitkernels.triton.launch import Launch, layout, planned
from bitkernels.triton.mixer_arguments import check_like, check_norm

# Strips of rows in the backward, each of which adds up its part of the weight's gradient: six a multiprocessor of an
# H200. A lane holds at most so many elements of a row.
STRIPS = 792
_LANE_ELEMENTS = 24


@triton.jit
def load_row(p_row, o_e, m_e, stride_e):
    return tl.load(p_row + o_e * stride_e, mask=m_e, other=0.0).to(tl.float32)


@triton.jit
def gated_rms_norm_kernel(
    p_x,  # [rows, D]
    p_z,  # [rows, D]
    p_weight,  # [D]
    p_y,  # [rows, D] contiguous
    D,
    stride_x_m,
    stride_x_d,
    stride_z_m,
    stride_z_d,
    stride_w_d,
    eps,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    i_first = tl.program_id(1) * GROUP
    o_e = tl.arange(0, BLOCK)
    square = tl.zeros([BLOCK], tl.float32)
    b_g = ()
    for i in tl.static_range(0, BLOCKS):
        o_d, m_e = i_first + i * BLOCK + o_e, i * BLOCK + o_e < GROUP
        g = load_row(p_x + i_m * stride_x_m, o_d, m_e, stride_x_d)
        g *= silu(load_row(p_z + i_m * stride_z_m, o_d, m_e, stride_z_d))
        square += g * g
        b_g = b_g + (g,)
    inverse = 1.0 / tl.sqrt(tl.sum(square, 0) / GROUP + eps)
    for i in tl.static_range(0, BLOCKS):
        o_d, m_e = i_first + i * BLOCK + o_e, i * BLOCK + o_e < GROUP
        y = b_g[i] * inverse * load_row(p_weight, o_d, m_e, stride_w_d)
        tl.store(p_y + i_m * D + o_d, y.to(p_y.dtype.element_ty), mask=m_e)


@triton.jit(do_not_specialize=["rows"])
def gated_rms_norm_backward_kernel(
    p_dy,  # [rows, D]
    p_x,  # [rows, D]
    p_z,  # [rows, D]
    p_weight,  # [D]
    p_dx,  # [rows, D] contiguous
    p_dz,  # [rows, D]
    p_dweight,  # [strips, D] float32
    rows,
    D,
    stride_dy_m,
    stride_dy_d,
    stride_x_m,
    stride_x_d,
    stride_z_m,
    stride_z_d,
    stride_dz_m,
    stride_w_d,
    eps,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    i_strip = tl.program_id(0).to(tl.int64)
    i_first = tl.program_id(1) * GROUP
    o_e = tl.arange(0, BLOCK)
    dweight = ()
    for _ in tl.static_range(0, BLOCKS):
        dweight = dweight + (tl.zeros([BLOCK], tl.float32),)
    for i_m in range(i_strip, rows, tl.num_programs(0)):
        # Of each block of a row what is left to do when both of the row's sums are known.
        b_dy, b_g, b_gate, b_slope = (), (), (), ()
        square = tl.zeros([BLOCK], tl.float32)
        along = square
        for i in tl.static_range(0, BLOCKS):
            o_d, m_e = i_first + i * BLOCK + o_e, i * BLOCK + o_e < GROUP
            dy = load_row(p_dy + i_m * stride_dy_m, o_d, m_e, stride_dy_d)
            x = load_row(p_x + i_m * stride_x_m, o_d, m_e, stride_x_d)
            z = load_row(p_z + i_m * stride_z_m, o_d, m_e, stride_z_d)
            gate = silu(z)
            g = x * gate
            square += g * g
            along += dy * load_row(p_weight, o_d, m_e, stride_w_d) * g
            b_dy, b_g, b_gate, b_slope = b_dy + (dy,), b_g + (g,), b_gate + (gate,), b_slope + (x * silu_gradient(z),)
        inverse = 1.0 / tl.sqrt(tl.sum(square, 0) / GROUP + eps)
        mean = tl.sum(along, 0) * inverse / GROUP
        sums = ()
        for i in tl.static_range(0, BLOCKS):
            o_d, m_e = i_first + i * BLOCK + o_e, i * BLOCK + o_e < GROUP
            normed = b_g[i] * inverse
            sums = sums + (dweight[i] + b_dy[i] * normed,)
            dg = (b_dy[i] * load_row(p_weight, o_d, m_e, stride_w_d) - normed * mean) * inverse
            tl.store(p_dx + i_m * D + o_d, (dg * b_gate[i]).to(p_dx.dtype.element_ty), mask=m_e)
            tl.store(p_dz + i_m * stride_dz_m + o_d, (dg * b_slope[i]).to(p_dz.dtype.element_ty), mask=m_e)
        dweight = sums
    for i in tl.static_range(0, BLOCKS):
        o_d, m_e = i_first + i * BLOCK + o_e, i * BLOCK + o_e < GROUP
        tl.store(p_dweight + i_strip * D + o_d, dweight[i], mask=m_e)


def _launch(width: int, group_size: int | None) -> tuple[int, dict]:
    """Groups of a row, and the blocks and warps that hold one: eight elements of a lane are one load of 16 bits each.

    Several blocks, as a row's padding to a power of two would take registers, which are what is short.
    """
    group = group_size or width
    block = min(1024, triton.next_power_of_2(group))
    options = {"BLOCK": block, "BLOCKS": triton.cdiv(group, block), "num_warps": max(1, block // 256)}
    return width // group, {"GROUP": group, **options}


def _backward_launch(width: int, group_size: int | None) -> tuple[int, dict]:
    """The same with more warps, for a lane to hold less."""
    group = group_size or width
    block = min(1024, triton.next_power_of_2(group))
    warps = min(16, triton.next_power_of_2(triton.cdiv(group, _LANE_ELEMENTS * 32)))
    blocks = triton.cdiv(group, block)
    return width // group, {"GROUP": group, "BLOCK": block, "BLOCKS": blocks, "num_warps": warps}


def _rows(t: Tensor) -> Tensor:
    """[rows, D]: a view unless the leading dimensions have no common stride."""
    return t.reshape(-1, t.shape[-1])


class NormPlan:
    """Checks arguments and plans the launch for them; call: the norm."""

    def __init__(self, x, z, weight, eps, group_size):
        check_norm("gated_rms_norm", x, z, weight, group_size)
        if x.numel() == 0:
            return
        D = x.shape[-1]
        groups, options = _launch(D, group_size)
        x, z = _rows(x), _rows(z)
        self.launch = Launch(
            gated_rms_norm_kernel, (x.shape[0], groups, 1), D, *x.stride(), *z.stride(), *weight.stride(), eps,
            *(options.pop(name) for name in ("GROUP", "BLOCK", "BLOCKS")), **options,
        )  # fmt: skip

    def __call__(self, x, z, weight) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.numel() > 0:
            self.launch(_rows(x), _rows(z), weight, y)
        return y


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-5, group_size: int | None = None) -> Tensor:
    """``bitkernels::gated_rms_norm``."""
    tensors = x, z, weight
    key = "gated_rms_norm", eps, group_size, *map(layout, tensors)
    return planned(key, lambda: NormPlan(*tensors, eps, group_size))(*tensors)


def gated_rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    dz: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``bitkernels::gated_rms_norm_backward``; ``dz`` is where that gradient is to be, perhaps a slice."""
    op = "gated_rms_norm_backward"
    check_norm(op, x, z, weight, group_size)
    check_like(op, "dy", dy, x, tuple(x.shape))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = torch.empty_like(dx) if dz is None else dz
    D = x.shape[-1]
    if x.numel() == 0:
        return dx, dz, torch.zeros(D, dtype=torch.float32, device=x.device)
    groups, options = _backward_launch(D, group_size)
    dy, x, z, dz_rows = _rows(dy), _rows(x), _rows(z), dz.view(-1, D)
    rows = x.shape[0]
    dweight = torch.empty(min(rows, STRIPS), D, dtype=torch.float32, device=x.device)
    gated_rms_norm_backward_kernel[(dweight.shape[0], groups)](
        dy, x, z, weight, dx, dz_rows, dweight, rows, D,
        *dy.stride(), *x.stride(), *z.stride(), dz_rows.stride(0), *weight.stride(), eps, **options,
    )  # fmt: skip
    return dx, dz, dweight.sum(0)
