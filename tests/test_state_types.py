"""A trained model, token by token: what 16-bit states cost."""

import math

import pytest
import torch
import torch.nn.functional as F

from bitkernels.checkpoint import load_checkpoint
from bitkernels.data import encode, shipped_chapters, shipped_model
from bitkernels.models.bimamba import Slots

REQUESTS, LENGTH = 8, 512


@torch.no_grad()
def perplexity(model, ids, state_dtype):
    """Of [B, T + 1] ids, read as requests decode: 16-bit states are rounded stochastically, by seed and position."""
    ids = ids.to(model.device)
    cache = model.new_cache(len(ids), state_dtype, padding=True)
    indices = torch.arange(len(ids), device=model.device)
    loss = 0.0
    for t in range(LENGTH):
        noise = () if state_dtype == torch.float32 else (2**40 + indices, torch.full_like(indices, t))
        logits = model.step(ids[:, t], cache, Slots(indices, *noise))
        loss += F.cross_entropy(logits.float(), ids[:, t + 1], reduction="sum").item()
    return math.exp(loss / (REQUESTS * LENGTH))


def test_perplexity_of_16_bit_states_is_within_a_thousandth(device):
    checkpoint = load_checkpoint(shipped_model(), device)
    unread = encode(checkpoint.tokenizer, shipped_chapters()[1])[: REQUESTS * LENGTH + 1]
    ids = unread.clone().unfold(0, LENGTH + 1, LENGTH)
    exact = perplexity(checkpoint.model, ids, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        found = perplexity(checkpoint.model, ids, dtype)
        assert found == pytest.approx(exact, rel=1e-3), f"{dtype}: {found:.4f}, float32 {exact:.4f}"
