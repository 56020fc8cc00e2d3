"""Held-out perplexity."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from bitkernels.data import encode
from bitkernels.models import BiMambaForCausalLM
from bitkernels.training.distributed import reshard_

# A word of several tokens can have a perplexity that no float holds.
_LARGEST_LOG = 700.0


@torch.no_grad()
def perplexity(model: BiMambaForCausalLM, tokens: Tensor, length: int = 256, batch_size: int = 16) -> float:
    """``exp`` of the mean next-token loss over ``tokens`` [T], each of which but the first is predicted once.

    The text is read in windows of ``length`` predictions, each starting from an empty state.
    """
    if tokens.numel() < 2:
        raise ValueError(f"perplexity: at least two tokens are needed, got {tokens.numel()}")
    training = model.training
    model.eval()
    predictions = tokens.numel() - 1
    whole = predictions // length
    windows = []
    if whole:
        windows += tokens[: whole * length + 1].unfold(0, length + 1, length).split(batch_size)
    if whole * length < predictions:
        windows.append(tokens[whole * length :].unsqueeze(0))
    total = 0.0
    for window in windows:
        window = window.to(model.device)
        targets = window[:, 1:]
        logits = model(window[:, :-1]).float()
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    model.train(training)
    reshard_(model)
    return math.exp(total / predictions)


@dataclass(frozen=True)
class Evaluation:
    perplexity: float
    tokens: int
    bits_per_byte: float  # does not depend on the tokenizer, nor does the next
    word_perplexity: float  # of the same loss shared out over words and ends of lines, as WikiText-2 counts them


def evaluate_text(
    model: BiMambaForCausalLM, tokenizer: Tokenizer, text: str, length: int = 256, tokens: int | None = None
) -> Evaluation:
    """Scores of ``text``, or of its first ``tokens`` predictions, in windows of ``length``."""
    ids = encode(tokenizer, text)[: None if tokens is None else tokens + 1]
    result = perplexity(model, ids, length)
    loss = math.log(result) * (len(ids) - 1)
    read = tokenizer.decode(ids[1:].tolist())
    words = len(read.split()) + read.count("\n")
    bits_per_byte = loss / math.log(2) / len(read.encode())
    return Evaluation(result, len(ids) - 1, bits_per_byte, math.exp(min(loss / max(words, 1), _LARGEST_LOG)))
