"""The weights that a model computes with, and what becomes of distances between words (Slender-Mamba, Appendix E)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels.models import BiMambaForCausalLM
from bitkernels.nn import BitEmbedding, BitLinear, FBILinear
from bitkernels.reference import quantize_ternary

_ROWS_AT_ONCE = 256


@torch.no_grad()
def effective_weight(module: nn.Module) -> Tensor:
    """The weight of a latent or full-precision layer after sign or rounding, rescaled, [N, K]."""
    if isinstance(module, FBILinear):
        return module.alpha * torch.where(module.weight >= 0, 1.0, -1.0) + module.beta
    if isinstance(module, BitLinear | BitEmbedding):
        q, scale = quantize_ternary(module.weight)
        return q * scale
    return module.weight.detach()


def layer_weights(model: BiMambaForCausalLM, position: int) -> dict[str, Tensor]:
    """Every tensor of the mixer at ``position``, by the names of the papers' pictures."""
    mixer = model.layers[position].mixer
    return {
        "A_log": mixer.A_log.detach(),
        "D": mixer.D.detach(),
        "dt_bias": mixer.dt_bias.detach(),
        "conv1d.weight": mixer.conv_weight.detach(),
        "conv1d.bias": mixer.conv_bias.detach(),
        "in_proj": effective_weight(mixer.in_proj),
        "out_proj": effective_weight(mixer.out_proj),
    }


@dataclass(frozen=True)
class EmbeddingComparison:
    l2: float  # between the matrices of cosine similarities
    rms: float  # the same for one pair of words, which does not grow with the vocabulary
    correlation: float  # of the similarities of all pairs of two words


@torch.no_grad()
def compare_embeddings(first: Tensor, second: Tensor) -> EmbeddingComparison:
    """Cosine similarities of all pairs of words in one table [V, K] against those in the other.

    A row at a time of the V x V matrices is enough, so large vocabularies need little memory.
    """
    if len(first) != len(second):
        raise ValueError(f"compare_embeddings: the vocabularies have {len(first)} and {len(second)} words")
    a, b = F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)
    sums = torch.zeros(5, dtype=torch.float64)
    squares = 0.0
    for begin in range(0, len(a), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        x, y = (a[rows] @ a.T).double(), (b[rows] @ b.T).double()
        squares += float((x - y).square().sum())
        own = torch.arange(len(x), device=x.device)
        x[own, begin + own] = y[own, begin + own] = 0.0  # a word with itself is no pair
        sums += torch.stack([x.sum(), y.sum(), x.square().sum(), y.square().sum(), (x * y).sum()]).cpu()
    pairs = len(a) * (len(a) - 1)
    x, y, xx, yy, xy = (sums / max(pairs, 1)).tolist()
    spread = ((xx - x * x) * (yy - y * y)) ** 0.5
    correlation = (xy - x * y) / spread if spread > 0 else float("nan")
    return EmbeddingComparison(squares**0.5, (squares / max(pairs, 1)) ** 0.5, correlation)


@torch.no_grad()
def sample_similarities(first: Tensor, second: Tensor, pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cosine similarities of the same random pairs of words in both tables, [pairs] each."""
    generator = torch.Generator().manual_seed(seed)
    i, j = torch.randint(len(first), (2, pairs), generator=generator)
    i, j = i[i != j], j[i != j]
    return tuple(F.cosine_similarity(table[i].float(), table[j].float(), dim=1) for table in (first, second))
