"""Training batches: windows of the token stream, in an order that the seed alone decides."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitkernels.data.cache import Tokens

_CHECKED = 2**20


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # int64 [B, length + 1]
    seq_idx: Tensor | None  # int32 [B, length], the document of each input, counted from 0; None for one document

    def to(self, device: torch.device) -> "Batch":
        return Batch(_to(self.tokens, device), None if self.seq_idx is None else _to(self.seq_idx, device))

    def copy_(self, other: "Batch") -> None:
        """Takes another batch's values, of the same shapes."""
        self.tokens.copy_(other.tokens, non_blocking=True)
        if self.seq_idx is not None:
            self.seq_idx.copy_(other.seq_idx, non_blocking=True)


def _to(t: Tensor, device: torch.device) -> Tensor:
    """A copy on a GPU for which nothing waits: pageable memory would be read only when the GPU gets there."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


class Windows:
    """Windows of ``length`` predictions, each token of an epoch predicted once, in shuffled order.

    Documents are packed: a window holds as many as fit, and ``seq_idx`` tells them apart. An epoch starts at an offset
    of its own, which leaves out less than two windows. Window ``i`` depends on the seed and on ``i`` alone, so a run
    that is taken up at any step, by any number of processes, sees the tokens that an unbroken one sees.
    """

    def __init__(self, data: Tensor | Tokens, length: int, seed: int = 0):
        self.tokens, self.starts = (data.tokens, data.starts) if isinstance(data, Tokens) else (data.numpy(), None)
        self.length, self.seed = length, seed
        if len(self.tokens) <= length:
            raise ValueError(f"train: the text has {len(self.tokens)} tokens, a window needs {length + 1}")
        predictions = len(self.tokens) - 1
        self.count = max(1, predictions // length - 1)
        self.slack = predictions - self.count * length
        self._epoch: tuple[int, int, np.ndarray] | None = None

    @property
    def checksum(self) -> int:
        """Of the text's first and last tokens: enough to tell one text from another."""
        ends = np.concatenate([self.tokens[:_CHECKED], self.tokens[-_CHECKED:]]).astype(np.int64)
        return zlib.crc32(ends.tobytes())

    def _begin(self, index: int) -> int:
        epoch, place = divmod(index, self.count)
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng((self.seed, epoch))
            self._epoch = epoch, int(random.integers(self.slack + 1)), random.permutation(self.count)
        _, offset, order = self._epoch
        return offset + int(order[place]) * self.length

    def batch(self, first: int, count: int) -> Batch:
        """Windows ``first`` to ``first + count - 1`` of the run."""
        begins = np.array([self._begin(index) for index in range(first, first + count)])
        positions = begins[:, None] + np.arange(self.length + 1)
        tokens = torch.from_numpy(self.tokens[positions].astype(np.int64))
        if self.starts is None:
            return Batch(tokens, None)
        document = np.searchsorted(self.starts, positions[:, :-1], side="right")
        return Batch(tokens, torch.from_numpy((document - document[:, :1]).astype(np.int32)))
