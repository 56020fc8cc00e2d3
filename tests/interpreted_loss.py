"""The rows of ``distill_loss`` in Triton against plain PyTorch; run by test_distill_loss.py under the interpreter."""

import pytest
import torch
from helpers import TOLERANCE, assert_close

from bitkernels.distill_loss import OBJECTIVES
from bitkernels.distill_loss import row_losses as plain
from bitkernels.triton.distill_loss import row_losses


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [1, 33, 5000])
def test_row_losses(V, dtype, objective, grad):
    logits, teacher = (4 * torch.randn(3, V).to(dtype) for _ in range(2))
    if V > 4096:
        teacher[:, :4500] = float("-inf")  # a first block without a finite logit
    targets = torch.randint(V, (3,)) if objective == "next_token" else None
    teacher = None if objective == "next_token" else teacher
    ours, expected = logits.clone(), logits.clone()
    losses = row_losses(ours, teacher, targets, objective, grad)
    assert_close("losses", losses, plain(expected, teacher, targets, objective, grad))
    assert_close("gradients", ours, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_large_logits(objective):
    """A large value in all logits changes nothing but their own rounding."""
    logits, teacher = (10_000 + torch.randn(40, 300) for _ in range(2))
    targets = torch.randint(300, (40,)) if objective == "next_token" else None
    teacher = None if objective == "next_token" else teacher
    expected = logits.double()
    losses = row_losses(logits, teacher, targets, objective, True)
    wide = None if teacher is None else teacher.double()
    assert_close("losses", losses, plain(expected, wide, targets, objective, True))
    assert_close("gradients", logits, expected)


def test_target_outside_the_vocabulary():
    losses = row_losses(torch.randn(3, 5), None, torch.tensor([5, 2, -1]), "next_token", True)
    assert losses.isnan().tolist() == [True, False, True]
