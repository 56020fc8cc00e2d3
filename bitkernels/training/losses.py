"""What a training step minimises."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels import distill_loss
from bitkernels.models import BiMambaForCausalLM
from bitkernels.nn import BitLinear
from bitkernels.nn.common import autocast_activation
from bitkernels.nn.ternary import NORM_EPS
from bitkernels.quantize_int8 import fake_quantize_int8
from bitkernels.reference import quantize_ternary


def training_loss(
    model: BiMambaForCausalLM,
    tokens: Tensor,  # int64 [B, T + 1]
    seq_idx: Tensor | None = None,  # int [B, T]
    teacher: nn.Module | None = None,
    objective: str = "cross_entropy",
    autocast: torch.dtype | None = None,
) -> Tensor:
    """The mean loss of the T predictions of each row; logits are held for some tokens at a time.

    Without a teacher, of the next token; with one, ``objective`` of ``distill_loss`` against its distribution. The
    teacher is a model of this package, or any module that maps ids [B, T] to logits [B, T, vocab_size], or to an object
    whose ``logits`` they are, as those of ``transformers`` do.
    """
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    context = torch.autocast(ids.device.type, autocast) if autocast else contextlib.nullcontext()
    with context:
        hidden, head = head_operands(model, model.hidden_states(ids, seq_idx))
        if teacher is None or objective == "next_token":
            return distill_loss(hidden, head, targets=targets, objective="next_token")
        with torch.no_grad():
            target = _teacher_arguments(teacher, ids, seq_idx)
        return distill_loss(hidden, head, **target, objective=objective)


def _teacher_arguments(teacher: nn.Module, ids: Tensor, seq_idx: Tensor | None) -> dict[str, Tensor]:
    if isinstance(teacher, BiMambaForCausalLM):
        hidden, head = head_operands(teacher, teacher.hidden_states(ids, seq_idx))
        return {"teacher_hidden": hidden, "teacher_head": head}
    if seq_idx is not None:
        raise ValueError("training_loss: only a teacher of this package reads rows of several documents (seq_idx)")
    logits = teacher(ids)
    return {"teacher_logits": getattr(logits, "logits", logits)}


def head_operands(model: BiMambaForCausalLM, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the model's head multiplies: the activations [..., K] and the weight [V, K].

    Gradients of a ternary head pass straight through its quantisations.
    """
    head = model.head
    if head is None:
        return autocast_activation(hidden), model.embedding.weight
    if isinstance(head, BitLinear):
        normed = F.rms_norm(hidden, (head.in_features,), head.norm_weight.to(hidden.dtype), NORM_EPS)
        x, weight = autocast_activation(normed), head.weight
        if head.act_bits == 8:
            x = x + (fake_quantize_int8(x.detach()) - x.detach())
        q, scale = quantize_ternary(weight.detach())
        return x, weight + (q * scale - weight.detach())
    if isinstance(head, nn.Linear):
        return autocast_activation(hidden), head.weight
    raise TypeError(f"training_loss: a head of type {type(head).__name__} cannot be trained")
