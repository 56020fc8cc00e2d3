"""``residual += update`` and the norm of the sum, a row in one program's registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.launch import Launch, layout, planned


@triton.jit
def add_rms_norm_kernel(
    p_residual,  # [rows, K]
    p_update,  # [rows, K] or None
    p_weight,  # [K]
    p_y,  # [rows, K] contiguous
    eps,
    stride_r_m,
    stride_r_k,
    stride_u_m,
    stride_u_k,
    stride_w_k,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < K
    p_residual += i_m * stride_r_m + o_k * stride_r_k
    v = tl.load(p_residual, mask=m_k, other=0.0)
    if p_update is not None:
        v += tl.load(p_update + i_m * stride_u_m + o_k * stride_u_k, mask=m_k, other=0.0).to(tl.float32)
        tl.store(p_residual, v, mask=m_k)
    weight = tl.load(p_weight + o_k * stride_w_k, mask=m_k, other=0.0).to(tl.float32)
    y = v / tl.sqrt(tl.sum(v * v, 0) / K + eps) * weight
    tl.store(p_y + i_m * K + o_k, y.to(p_y.dtype.element_ty), mask=m_k)


def _rows(t: Tensor) -> Tensor:
    """[rows, K]: a view unless the leading dimensions have no common stride."""
    return t.reshape(-1, t.shape[-1])


def _plan(residual: Tensor, update: Tensor | None, weight: Tensor) -> Launch:
    rows, K = residual.shape
    block = triton.next_power_of_2(K)
    strides = *residual.stride(), *((0, 0) if update is None else update.stride()), *weight.stride()
    return Launch(add_rms_norm_kernel, (rows, 1, 1), *strides, K, block, num_warps=min(16, max(1, block // 512)))


def add_rms_norm(
    residual: Tensor, update: Tensor | None, weight: Tensor, dtype: torch.dtype, eps: float = 1e-5
) -> Tensor:
    """``bitkernels::add_rms_norm`` of checked arguments."""
    y = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    if y.numel() == 0:
        return y
    into, added = _rows(residual), None if update is None else _rows(update)
    key = "add_rms_norm", dtype, *map(layout, (into, added, weight))
    planned(key, lambda: _plan(into, added, weight))(into, added, weight, y, eps)
    if into.data_ptr() != residual.data_ptr():
        residual.copy_(into.view(residual.shape))
    return y
