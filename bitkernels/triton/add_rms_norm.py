"""``total = residual + branch`` and ``RMSNorm(total) * weight``, a row in one program's registers; or that norm of one
tensor."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.arguments import check, check_shape
from bitkernels.triton.gated_rms_norm import load_row
from bitkernels.triton.launch import Launch, layout, planned
from bitkernels.triton.mixer_arguments import check_activation, check_floating

# Strips of rows in the backward; each adds up its part of the weight's gradient.
STRIPS = 1024


@triton.jit
def add_rms_norm_kernel(
    p_residual,  # [rows, D] or None
    p_branch,  # [rows, D]
    p_weight,  # [D]
    p_total,  # [rows, D] or None: not kept
    p_normed,  # [rows, D]
    D,
    eps,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64) * D
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    total = load_row(p_branch + i_row, o_d, m_d, 1)
    if p_residual is not None:
        total += load_row(p_residual + i_row, o_d, m_d, 1)
    if p_total is not None:
        tl.store(p_total + i_row + o_d, total, mask=m_d)
    normed = total / tl.sqrt(tl.sum(total * total, 0) / D + eps) * load_row(p_weight, o_d, m_d, 1)
    tl.store(p_normed + i_row + o_d, normed.to(p_normed.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm_backward_kernel(
    p_dtotal,  # [rows, D] or None
    p_dnormed,  # [rows, D]
    p_total,  # [rows, D]
    p_weight,  # [D]
    p_dresidual,  # [rows, D]
    p_dbranch,  # [rows, D]
    p_dweight,  # [strips, D] float32
    rows,
    D,
    eps,
    BLOCK: tl.constexpr,
):
    i_strip = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    weight = load_row(p_weight, o_d, m_d, 1)
    dweight = tl.zeros([BLOCK], tl.float32)
    for i_m in range(i_strip, rows, tl.num_programs(0)):
        i_row = i_m * D
        dnormed = load_row(p_dnormed + i_row, o_d, m_d, 1)
        total = load_row(p_total + i_row, o_d, m_d, 1)
        # Both sums of a row, before either is needed.
        square, along = tl.sum(total * total, 0), tl.sum(dnormed * weight * total, 0)
        inverse = 1.0 / tl.sqrt(square / D + eps)
        normed = total * inverse
        dweight += dnormed * normed
        d = (dnormed * weight - normed * (along * inverse / D)) * inverse
        if p_dtotal is not None:
            d += load_row(p_dtotal + i_row, o_d, m_d, 1)
        tl.store(p_dresidual + i_row + o_d, d, mask=m_d)
        tl.store(p_dbranch + i_row + o_d, d.to(p_dbranch.dtype.element_ty), mask=m_d)
    tl.store(p_dweight + i_strip * D + o_d, dweight, mask=m_d)


def _block(width: int) -> dict:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


class AddNormPlan:
    """Checks arguments and plans the launch for them; call: the sum and its norm."""

    def __init__(self, residual, branch, weight, eps):
        op = "add_rms_norm"
        check_activation(op, "branch", branch)
        check(branch.dim() >= 1, op, "branch must have at least one dimension")
        check_floating(op, "weight", weight, branch, tuple(branch.shape[-1:]))
        if residual is not None:
            check(residual.dtype == torch.float32, op, f"residual must be torch.float32, got {residual.dtype}")
            check_shape(op, "residual", residual, tuple(branch.shape))
        if branch.numel():
            options = _block(branch.shape[-1])
            D, block = branch.shape[-1], options.pop("BLOCK")
            self.launch = Launch(add_rms_norm_kernel, (branch.numel() // D, 1, 1), D, eps, block, **options)

    def __call__(self, residual, branch, weight, dtype) -> tuple[Tensor, Tensor]:
        total = torch.empty(branch.shape, dtype=torch.float32, device=branch.device)
        normed = torch.empty(branch.shape, dtype=dtype, device=branch.device)
        if branch.numel():
            residual = None if residual is None else residual.contiguous()
            self.launch(residual, branch.contiguous(), weight.contiguous(), total, normed)
        return total, normed


def add_rms_norm(
    residual: Tensor | None, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``bitkernels::add_rms_norm``."""
    tensors = residual, branch, weight
    key = "add_rms_norm", eps, dtype, *map(layout, tensors)
    return planned(key, lambda: AddNormPlan(*tensors, eps))(*tensors, dtype)


class NormPlan:
    """Checks arguments and plans the launch for them; call: the norm."""

    def __init__(self, x, weight, eps):
        check_activation("rms_norm", "x", x)
        check(x.dim() >= 1, "rms_norm", "x must have at least one dimension")
        check_floating("rms_norm", "weight", weight, x, tuple(x.shape[-1:]))
        if x.numel():
            options = _block(x.shape[-1])
            block, D = options.pop("BLOCK"), x.shape[-1]
            self.launch = Launch(add_rms_norm_kernel, (x.numel() // D, 1, 1), D, eps, block, **options)

    def __call__(self, x, weight, dtype) -> Tensor:
        normed = torch.empty(x.shape, dtype=dtype, device=x.device)
        if x.numel():
            self.launch(None, x.contiguous(), weight.contiguous(), None, normed)
        return normed


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``bitkernels::rms_norm``."""
    key = "rms_norm", eps, dtype, layout(x), layout(weight)
    return planned(key, lambda: NormPlan(x, weight, eps))(x, weight, dtype)


def add_rms_norm_backward(
    dtotal: Tensor | None, dnormed: Tensor | None, total: Tensor, weight: Tensor, eps: float, branch_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``bitkernels::add_rms_norm_backward``."""
    D = weight.shape[0]
    dresidual = torch.empty(total.shape, dtype=torch.float32, device=total.device)
    dbranch = torch.empty(total.shape, dtype=branch_dtype, device=total.device)
    if total.numel() == 0:
        return dresidual, dbranch, torch.zeros(D, dtype=torch.float32, device=total.device)
    dnormed = torch.zeros_like(total) if dnormed is None else dnormed.contiguous()
    rows = total.numel() // D
    dweight = torch.empty(min(rows, STRIPS), D, dtype=torch.float32, device=total.device)
    add_rms_norm_backward_kernel[(dweight.shape[0],)](
        None if dtotal is None else dtotal.contiguous(), dnormed, total, weight.contiguous(), dresidual, dbranch,
        dweight, rows, D, eps, **_block(D),
    )  # fmt: skip
    return dresidual, dbranch, dweight.sum(0)
