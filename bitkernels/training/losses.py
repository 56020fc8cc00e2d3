"""Training objectives."""

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(logits: Tensor, teacher_logits: Tensor, objective: str = "cross_entropy") -> Tensor:
    """Cross-entropy against the teacher's next-token distribution (Bi-Mamba, eq. 6), averaged over tokens.

    ``objective="kl"`` takes the teacher's entropy off, which changes the value and no gradient. Both are
    [..., vocab_size]; no gradient reaches the teacher.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"distillation_loss: logits and teacher_logits must have one shape, got {list(logits.shape)} "
            f"and {list(teacher_logits.shape)}"
        )
    target = teacher_logits.detach().float().softmax(-1)
    loss = F.cross_entropy(logits.float().flatten(0, -2), target.flatten(0, -2))
    return loss + torch.special.xlogy(target, target).sum(-1).mean() if objective == "kl" else loss


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of [..., vocab_size] logits against the tokens that came, averaged over tokens."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
