"""Losses of rows of logits, and the gradients in their place: the softmax of teacher and student in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.arguments import on_its_device


@triton.jit
def load_logits(p_row, o_v, V, stride_v):
    return tl.load(p_row + o_v * stride_v, mask=o_v < V, other=float("-inf")).to(tl.float32)


@triton.jit
def add_block(b_v, maximum, b_sum):
    """A block of values into the running maximum, and into the sums of exponentials of each lane."""
    larger = tl.maximum(maximum, tl.max(b_v, 0))
    return larger, b_sum * tl.exp(maximum - larger) + tl.exp(b_v - larger)


@triton.jit
def row_losses_kernel(
    p_logits,  # [M, V] contiguous; takes the gradients
    p_teacher,  # [M, V]
    p_targets,  # int64 [M]
    p_losses,  # float32 [M]
    V,
    stride_t_m,
    stride_t_v,
    stride_g,
    TEACHER: tl.constexpr,
    KL: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    p_s = p_logits + i_m * V
    p_t = p_teacher + i_m * stride_t_m if TEACHER else p_logits
    o_block = tl.arange(0, BLOCK)

    # Maxima start finite, so that a logit of minus infinity is exp(-inf) = 0 from the first on.
    s_max = tl.full((), -3.0e38, tl.float32)
    t_max = s_max
    b_s_sum = tl.zeros([BLOCK], tl.float32)
    b_t_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        s_max, b_s_sum = add_block(load_logits(p_s, start + o_block, V, 1), s_max, b_s_sum)
        if TEACHER:
            t_max, b_t_sum = add_block(load_logits(p_t, start + o_block, V, stride_t_v), t_max, b_t_sum)
    # Maximum and logarithm are taken off one after the other: their sum would round to the maximum's last place.
    s_log_sum = tl.log(tl.sum(b_s_sum, 0))
    t_log_sum = tl.log(tl.sum(b_t_sum, 0)) if TEACHER else 0.0

    target = tl.load(p_targets + i_m * stride_g) if not TEACHER else 0
    if not TEACHER:
        # A token outside the vocabulary has no logit: its loss is NaN.
        inside = (target >= 0) & (target < V)
        logit = tl.load(p_s + target, mask=inside, other=float("nan")).to(tl.float32)
        tl.store(p_losses + i_m, s_log_sum - (logit - s_max))
        # All threads have read the logit before one of them puts its gradient there.
        tl.debug_barrier()
    if GRAD or TEACHER:
        b_loss = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            o_v = start + o_block
            b_log_q = load_logits(p_s, o_v, V, 1) - s_max - s_log_sum
            if not TEACHER:
                b_p = (o_v == target).to(tl.float32)
            else:
                b_log_p = load_logits(p_t, o_v, V, stride_t_v) - t_max - t_log_sum
                b_p = tl.exp(b_log_p)
                b_term = b_p * (b_log_p - b_log_q) if KL else -b_p * b_log_q
                b_loss += tl.where(b_p > 0, b_term, 0.0)
            if GRAD:
                b_grad = (tl.exp(b_log_q) - b_p).to(p_logits.dtype.element_ty)
                tl.store(p_s + o_v, b_grad, mask=o_v < V)
        if TEACHER:
            tl.store(p_losses + i_m, tl.sum(b_loss, 0))


@on_its_device
def row_losses(logits: Tensor, teacher: Tensor | None, targets: Tensor | None, objective: str, grad: bool) -> Tensor:
    """``bitkernels.distill_loss.RowLosses``."""
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    block = min(4096, triton.next_power_of_2(max(V, 16)))
    row_losses_kernel[(M,)](
        logits, teacher, targets, losses, V,
        *(teacher.stride() if teacher is not None else (0, 0)), targets.stride(0) if targets is not None else 0,
        TEACHER=teacher is not None, KL=objective == "kl", GRAD=grad, BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return losses
