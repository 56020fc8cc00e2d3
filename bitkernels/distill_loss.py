"""``distill_loss``: a language model's head and its loss in one, for a chunk of tokens at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)
from bitkernels.ssd_scan import acc_dtype

OBJECTIVES = ("cross_entropy", "kl", "next_token")

# How many logits are held at once. On a GPU a chunk's products must be large enough to run at full speed, and the
# gradient of the head is added up once a chunk; on a CPU few tokens are enough.
LOGITS_AT_ONCE = {"cuda": 2**27, "cpu": 2**23}

# Of some tokens: (student's logits [M, V], teacher's logits [M, V] or None, targets [M] or None, objective, grad) ->
# losses [M] in float32 or wider. With grad, the gradients of their sum take the place of the student's logits.
RowLosses = Callable[[Tensor, Tensor | None, Tensor | None, str, bool], Tensor]


def distill_loss(
    hidden: Tensor,
    head: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    targets: Tensor | None = None,
    objective: str = "cross_entropy",
) -> Tensor:
    """The mean loss over tokens of the logits ``hidden @ head^T``, which are never held for all tokens at once.

    Objectives, with p and q the teacher's and the student's distribution over the vocabulary of a token:

    - ``"cross_entropy"``: ``-sum_v p_v log q_v``, autoregressive distillation (Bi-Mamba, eq. 6);
    - ``"kl"``: ``sum_v p_v (log p_v - log q_v)``;
    - ``"next_token"``: ``-log q_target``, without a teacher.

    The gradients are computed in the forward, chunk by chunk, from the logits while they are there; the backward only
    scales them, so there are no second derivatives. None reaches the teacher.

    Args:
        hidden: [..., K], float32, bfloat16 or float16 (float64 on the CPU).
        head: [V, K], any floating-point dtype; cast to hidden's for the product.
        teacher_logits: [..., V], any floating-point dtype.
        teacher_hidden: [..., K'], with teacher_head in the place of teacher_logits.
        teacher_head: [V, K'], cast to teacher_hidden's dtype.
        targets: int64 [...], the tokens that came; of ``"next_token"`` alone.
        objective: one of those above.

    Returns:
        A scalar in float32 (float64 for float64), 0 for no tokens. Differentiable in hidden and head.

    Raises:
        ValueError: an argument is missing, one too many, or its dtype, shape or device does not fit.
    """
    track = torch.is_grad_enabled()
    return torch.ops.bitkernels.distill_loss(
        hidden, head, teacher_logits, teacher_hidden, teacher_head, targets, objective,
        track and hidden.requires_grad, track and head.requires_grad,
    )[0]  # fmt: skip


def _check(
    hidden: Tensor,
    head: Tensor,
    teacher_logits: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    targets: Tensor | None,
    objective: str,
) -> None:
    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"distill_loss: {message}")

    def require_float(name: str, t: Tensor) -> None:
        require(t.is_floating_point(), f"{name} must be of a floating-point type, got {t.dtype}")

    require(objective in OBJECTIVES, f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    require(hidden.dim() >= 1, "hidden must have at least one dimension")
    require_float("hidden", hidden)
    require(
        hidden.dtype != torch.float64 or hidden.device.type == "cpu",
        f"hidden must be float32, bfloat16 or float16 on {hidden.device.type}, got {hidden.dtype}",
    )
    require_float("head", head)
    require(
        head.dim() == 2 and head.shape[0] > 0 and head.shape[1] == hidden.shape[-1],
        f"head must be [V, {hidden.shape[-1]}] with V > 0, got {list(head.shape)}",
    )
    given = {"head": head, "teacher_logits": teacher_logits, "teacher_hidden": teacher_hidden,
             "teacher_head": teacher_head, "targets": targets}  # fmt: skip
    for name, t in given.items():
        require(t is None or t.device == hidden.device, f"{name} must be on {hidden.device}, hidden's device")
    tokens, V = hidden.shape[:-1], head.shape[0]
    if objective == "next_token":
        require(targets is not None, "targets must be given for objective 'next_token'")
        require(
            teacher_logits is None and teacher_hidden is None and teacher_head is None,
            "objective 'next_token' takes no teacher",
        )
        require(targets.dtype == torch.int64, f"targets must be int64, got {targets.dtype}")
        require(targets.shape == tokens, f"targets must be {list(tokens)}, got {list(targets.shape)}")
        return
    require(targets is None, f"targets belong to objective 'next_token', got objective {objective!r}")
    if teacher_logits is not None:
        require(
            teacher_hidden is None and teacher_head is None,
            "teacher_logits and teacher_hidden with teacher_head exclude each other",
        )
        require_float("teacher_logits", teacher_logits)
        require(
            teacher_logits.shape == (*tokens, V),
            f"teacher_logits must be {[*tokens, V]}, got {list(teacher_logits.shape)}",
        )
        return
    require(
        teacher_hidden is not None and teacher_head is not None,
        f"objective {objective!r} needs teacher_logits, or teacher_hidden and teacher_head",
    )
    require_float("teacher_hidden", teacher_hidden)
    require_float("teacher_head", teacher_head)
    require(
        teacher_hidden.shape[:-1] == tokens,
        f"teacher_hidden must be {list(tokens)} and its width, got {list(teacher_hidden.shape)}",
    )
    require(
        teacher_head.shape == (V, teacher_hidden.shape[-1]),
        f"teacher_head must be {[V, teacher_hidden.shape[-1]]}, got {list(teacher_head.shape)}",
    )


@torch.library.impl("bitkernels::distill_loss", "CompositeExplicitAutograd")
def _(
    hidden, head, teacher_logits=None, teacher_hidden=None, teacher_head=None, targets=None,
    objective="cross_entropy", hidden_grad=False, head_grad=False,
):  # fmt: skip
    _check(hidden, head, teacher_logits, teacher_hidden, teacher_head, targets, objective)
    of_rows = _row_losses_on(hidden.device)
    acc = acc_dtype(hidden.dtype)
    K, V = hidden.shape[-1], head.shape[0]
    rows = hidden.reshape(-1, K)
    M = rows.shape[0]
    dhidden = rows.new_empty(rows.shape if hidden_grad else 0)
    dhead = rows.new_empty(head.shape if head_grad else 0, dtype=acc)  # set by the first chunk
    losses = rows.new_empty(M, dtype=acc)
    weight = head.to(hidden.dtype)
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden.reshape(M, teacher_hidden.shape[-1])
        teacher_head = teacher_head.to(teacher_hidden.dtype)
    elif teacher_logits is not None:
        teacher_logits = teacher_logits.reshape(M, V)
    targets = None if targets is None else targets.reshape(-1)

    step = max(1, LOGITS_AT_ONCE[hidden.device.type] // V)
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, M, step):
            part = slice(begin, min(begin + step, M))
            if teacher_hidden is not None:
                teacher = teacher_hidden[part] @ teacher_head.t()
            else:
                teacher = None if teacher_logits is None else teacher_logits[part]
            logits = rows[part] @ weight.t()
            target = None if targets is None else targets[part]
            losses[part] = of_rows(logits, teacher, target, objective, hidden_grad or head_grad)
            if hidden_grad:
                torch.mm(logits, weight, out=dhidden[part])
            if head_grad:
                _accumulate(dhead, logits, rows[part], first=begin == 0)
            del logits, teacher  # before the next chunk's are made
    if M == 0:
        dhead.zero_()
    return losses.sum() / max(1, M), dhidden.view(hidden.shape) if hidden_grad else dhidden, dhead


def _accumulate(total: Tensor, dlogits: Tensor, rows: Tensor, first: bool) -> None:
    """Adds ``dlogits^T @ rows`` to ``total``, which the first chunk sets. The sums of 16-bit values are float32."""
    if dlogits.is_cuda and dlogits.dtype != total.dtype:
        if first:
            torch.mm(dlogits.t(), rows, out_dtype=total.dtype, out=total)
        else:
            total.add_(torch.mm(dlogits.t(), rows, out_dtype=total.dtype))
        return
    torch.addmm(total, dlogits.t().to(total.dtype), rows.to(total.dtype), beta=0 if first else 1, out=total)


def row_losses(logits: Tensor, teacher: Tensor | None, targets: Tensor | None, objective: str, grad: bool) -> Tensor:
    """``RowLosses`` in plain PyTorch."""
    wide = acc_dtype(logits.dtype)
    log_q = logits.to(wide).log_softmax(-1)
    if objective == "next_token":
        losses = -log_q.gather(-1, targets[:, None])[:, 0]
        if grad:
            log_q.exp_()[torch.arange(len(targets)), targets] -= 1
            logits.copy_(log_q)
        return losses
    log_p = teacher.to(wide).log_softmax(-1)
    p = log_p.exp()
    terms = p * (log_p - log_q) if objective == "kl" else -p * log_q
    # Where p is zero, the term is zero even for a logarithm of minus infinity.
    losses = terms.where(p > 0, 0.0).sum(-1)
    if grad:
        logits.copy_(log_q.exp_().sub_(p))
    return losses


def _row_losses_on(device: torch.device) -> RowLosses:
    if device.type == "cpu":
        return row_losses
    from bitkernels.triton import distill_loss

    return distill_loss.row_losses


@torch.library.register_fake("bitkernels::distill_loss")
def _(
    hidden, head, teacher_logits=None, teacher_hidden=None, teacher_head=None, targets=None,
    objective="cross_entropy", hidden_grad=False, head_grad=False,
):  # fmt: skip
    _check(hidden, head, teacher_logits, teacher_hidden, teacher_head, targets, objective)
    acc = acc_dtype(hidden.dtype)
    dhidden = hidden.new_empty(hidden.shape if hidden_grad else 0)
    return hidden.new_empty((), dtype=acc), dhidden, head.new_empty(head.shape if head_grad else 0, dtype=acc)


def _setup_context(ctx, inputs, output):
    hidden, head, *_ = inputs
    _, dhidden, dhead = output
    ctx.mark_non_differentiable(dhidden, dhead)
    ctx.save_for_backward(dhidden, dhead)
    ctx.tokens, ctx.head_dtype = max(1, hidden.shape[:-1].numel()), head.dtype
    ctx.has = [t.numel() == g.numel() for t, g in ((hidden, dhidden), (head, dhead))]


def _backward(ctx, grad, *_):
    dhidden, dhead = ctx.saved_tensors
    # Only now the mean over tokens: in float16 a gradient divided by their number could vanish before it is scaled.
    scale = grad / ctx.tokens
    need_hidden, need_head = ctx.needs_input_grad[:2]
    for name, need, has in (("hidden", need_hidden, ctx.has[0]), ("head", need_head, ctx.has[1])):
        if need and not has:
            raise RuntimeError(f"distill_loss: the gradient of {name} was not computed in the forward")
    return (
        (dhidden.to(scale.dtype) * scale).to(dhidden.dtype) if need_hidden else None,
        (dhead * scale).to(ctx.head_dtype) if need_head else None,
        *[None] * 7,
    )


torch.library.register_autograd("bitkernels::distill_loss", _backward, setup_context=_setup_context)
