"""An embedding of 8 bits a weight, which the head shares."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels import dense_linear
from bitkernels.dense_linear import torch_is_slow

_LARGEST = 127
# Up to which dense_linear is faster than widening the weight first.
_FEW_TOKENS = 16


class Int8Embedding(nn.Module):
    """A table rounded to int8, with a scale for each row; the result takes the type of ``out_dtype``.

    For inference: a decode step reads all of the table, as its head.
    """

    weight_bits = 8

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        out_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.out_dtype = num_embeddings, embedding_dim, out_dtype
        self.register_buffer("weight", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.zeros(num_embeddings, device=device))

    @classmethod
    @torch.no_grad()
    def from_embedding(cls, embedding: nn.Embedding) -> "Int8Embedding":
        weight = embedding.weight
        rounded = cls(*weight.shape, weight.device, weight.dtype)
        # In parts: a table in float32 is large.
        for rows, to, scale in zip(*(t.split(4096) for t in (weight, rounded.weight, rounded.scale)), strict=True):
            wide = rows.float()
            scale.copy_(wide.abs().amax(-1) / _LARGEST)
            to.copy_((wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round())
        return rounded.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.weight[ids] * self.scale[ids][..., None]).to(self.out_dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """The table as a head: [..., embedding_dim] -> [..., num_embeddings]."""
        few = hidden.numel() <= _FEW_TOKENS * self.embedding_dim
        if few or (torch_is_slow(hidden) and not hidden.requires_grad):
            return dense_linear(hidden, self.weight, self.scale)
        return F.linear(hidden, (self.weight * self.scale[:, None]).to(hidden.dtype))

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"
