"""Training objectives."""

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy against the teacher's next-token distribution (Bi-Mamba, eq. 6), averaged over tokens.

    Both are [..., vocab_size]; no gradient reaches the teacher.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"distillation_loss: logits and teacher_logits must have one shape, got {list(logits.shape)} "
            f"and {list(teacher_logits.shape)}"
        )
    target = teacher_logits.detach().float().softmax(-1)
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten(0, -2))


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of [..., vocab_size] logits against the tokens that came, averaged over tokens."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
