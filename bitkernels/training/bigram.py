"""A bigram model: what a language model must beat to have learned more than neighbouring tokens."""

import math

import torch
from torch import Tensor


class BigramModel:
    """Interpolated Kneser-Ney over pairs of tokens.

    ``p(w | v) = max(c(v, w) - d, 0) / c(v) + d n(v) / c(v) * q(w)`` where n(v) counts the distinct
    followers of v, and q(w), the share of distinct predecessors, is itself smoothed by one pair for each
    token of the vocabulary. The discount d is ``n1 / (n1 + 2 n2)`` (Ney), n1 and n2 the numbers of pairs
    seen once and twice.
    """

    def __init__(self, tokens: Tensor, vocab_size: int):
        self.vocab_size = vocab_size
        pairs, counts = (tokens[:-1] * vocab_size + tokens[1:]).unique(return_counts=True)
        first, second = pairs // vocab_size, pairs % vocab_size
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        self.discount = once / (once + 2 * twice) if once and twice else 0.5
        self.pairs, self.counts = pairs, counts.double()
        self.context = torch.zeros(vocab_size, dtype=torch.float64).index_add_(0, first, self.counts)
        self.followers = torch.bincount(first, minlength=vocab_size).double()
        predecessors = torch.bincount(second, minlength=vocab_size).double() + 1
        self.backoff = predecessors / predecessors.sum()

    def probability(self, first: Tensor, second: Tensor) -> Tensor:
        """p(second | first) for each pair of int64 tokens."""
        wanted = first * self.vocab_size + second
        place = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        count = torch.where(self.pairs[place] == wanted, self.counts[place], 0.0)
        context = self.context[first]
        share = self.discount * self.followers[first] / context
        seen = (count - self.discount).clamp(min=0) / context + share * self.backoff[second]
        return torch.where(context > 0, seen, self.backoff[second])

    def perplexity(self, tokens: Tensor) -> float:
        """Over ``tokens`` [T], each of which but the first is predicted once."""
        return math.exp(-float(self.probability(tokens[:-1], tokens[1:]).log().mean()))
