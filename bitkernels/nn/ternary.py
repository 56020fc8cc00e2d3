"""BitLinear and BitEmbedding (Slender-Mamba, after BitNet b1.58), and their packed forms."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels import (
    bit_embedding,
    quantize_int8,
    ternary_linear,
    ternary_linear_ste,
    unpack_ternary,
)
from bitkernels.nn.common import autocast_activation, check_finite, check_width
from bitkernels.ternary_linear_ste import quantize_ternary

_CODES_PER_WORD = 16

NORM_EPS = 1e-6

# Of a ternary weight, as the papers count them: log2(3), rounded.
TERNARY_BITS = 1.58


class BitLinear(nn.Module):
    """A linear layer that trains ternary weights, with int8 activations.

    ``x`` passes the layer's own RMSNorm, is quantised to int8 per token, and meets ``W~ = Q / s``; the
    gradient of both roundings is the identity. ``act_bits=None`` leaves the activations as they are.
    """

    weight_bits = TERNARY_BITS

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        act_bits: int | None = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.act_bits = in_features, out_features, act_bits
        self.norm_weight = nn.Parameter(torch.ones(in_features, **factory))
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.zeros(out_features, **factory)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    @classmethod
    def from_linear(cls, linear: nn.Linear, act_bits: int | None = 8) -> "BitLinear":
        """The ternary form of ``linear``; shares its bias and takes its weight as the latent one."""
        weight = linear.weight
        layer = cls(linear.in_features, linear.out_features, False, act_bits, weight.device, weight.dtype)
        layer.weight = nn.Parameter(weight.detach().clone())
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        check_width("BitLinear", x, self.in_features)
        x = autocast_activation(F.rms_norm(x, (self.in_features,), self.norm_weight.to(x.dtype), NORM_EPS))
        return ternary_linear_ste(x, self.weight, self.bias, self.act_bits)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, act_bits={self.act_bits}"
        )


class PackedBitLinear(nn.Module):
    """The inference form of ``BitLinear``: two bits a weight, integer accumulation with int8 activations."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        act_bits: int | None = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        words = -(-in_features // _CODES_PER_WORD)
        self.in_features, self.out_features, self.act_bits = in_features, out_features, act_bits
        self.register_buffer("norm_weight", torch.zeros(in_features, device=device, dtype=dtype))
        self.register_buffer("w_packed", torch.zeros(out_features, words, dtype=torch.uint32, device=device))
        self.register_buffer("scale", torch.zeros(1, device=device, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    @classmethod
    def empty_like(cls, layer: BitLinear) -> "PackedBitLinear":
        """A layer of the same geometry with all weights zero, to load a checkpoint into."""
        weight = layer.weight
        sizes = (layer.in_features, layer.out_features, layer.bias is not None, layer.act_bits)
        return cls(*sizes, weight.device, layer.norm_weight.dtype)

    @classmethod
    @torch.no_grad()
    def from_latent(cls, layer: BitLinear, name: str = "BitLinear") -> "PackedBitLinear":
        """Packs ``layer``; ``name`` is what an error calls it."""
        check_finite(name, weight=layer.weight, norm_weight=layer.norm_weight, bias=layer.bias)
        packed = cls.empty_like(layer)
        packed.w_packed, packed.scale = quantize_ternary(layer.weight)
        packed.norm_weight.copy_(layer.norm_weight)
        if layer.bias is not None:
            packed.bias.copy_(layer.bias)
        return packed.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        check_width("PackedBitLinear", x, self.in_features)
        x = autocast_activation(F.rms_norm(x, (self.in_features,), self.norm_weight.to(x.dtype), NORM_EPS))
        return ternary_linear(x, self.w_packed, self.scale, self.bias, self.act_bits)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, act_bits={self.act_bits}"
        )


class BitEmbedding(nn.Module):
    """A ternary embedding table: lookup, LayerNorm, int8 per token; straight-through gradients.

    ``out_dtype`` is the type of the result; None takes the table's.
    """

    weight_bits = TERNARY_BITS

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, **factory))
        self.norm_weight = nn.Parameter(torch.ones(embedding_dim, **factory))
        self.norm_bias = nn.Parameter(torch.zeros(embedding_dim, **factory))
        self.out_dtype: torch.dtype | None = None
        nn.init.normal_(self.weight)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "BitEmbedding":
        """The ternary form of ``embedding``, whose table becomes the latent one."""
        weight = embedding.weight
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, weight.device, weight.dtype)
        layer.weight = nn.Parameter(weight.detach().clone())
        return layer.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        y = bit_embedding(ids, self.weight, self.norm_weight, self.norm_bias, NORM_EPS)
        return y.to(self.out_dtype or y.dtype)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"


class PackedBitEmbedding(nn.Module):
    """The inference form of ``BitEmbedding``: gathers rows of words and unpacks only those."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        words = -(-embedding_dim // _CODES_PER_WORD)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("w_packed", torch.zeros(num_embeddings, words, dtype=torch.uint32, device=device))
        self.register_buffer("scale", torch.zeros(1, device=device, dtype=torch.float32))
        self.register_buffer("norm_weight", torch.zeros(embedding_dim, device=device, dtype=dtype))
        self.register_buffer("norm_bias", torch.zeros(embedding_dim, device=device, dtype=dtype))
        self.out_dtype: torch.dtype | None = None

    @classmethod
    def empty_like(cls, layer: BitEmbedding) -> "PackedBitEmbedding":
        """A layer of the same geometry with all weights zero, to load a checkpoint into."""
        packed = cls(layer.num_embeddings, layer.embedding_dim, layer.weight.device, layer.norm_weight.dtype)
        packed.out_dtype = layer.out_dtype
        return packed

    @classmethod
    @torch.no_grad()
    def from_latent(cls, layer: BitEmbedding, name: str = "BitEmbedding") -> "PackedBitEmbedding":
        """Packs ``layer``; ``name`` is what an error calls it."""
        check_finite(name, weight=layer.weight, norm_weight=layer.norm_weight, norm_bias=layer.norm_bias)
        packed = cls.empty_like(layer)
        packed.w_packed, packed.scale = quantize_ternary(layer.weight)
        packed.norm_weight.copy_(layer.norm_weight)
        packed.norm_bias.copy_(layer.norm_bias)
        return packed.train(layer.training)

    def forward(self, ids: Tensor) -> Tensor:
        # uint32 has no index kernel on every device; the bits are the same as int32.
        rows = self.w_packed.view(torch.int32)[ids.reshape(-1)].view(torch.uint32)
        table = unpack_ternary(rows, self.embedding_dim, self.norm_weight.dtype)
        table = (table * self.scale.to(table.dtype)).view(*ids.shape, self.embedding_dim)
        y = F.layer_norm(table, (self.embedding_dim,), self.norm_weight, self.norm_bias, NORM_EPS)
        q, act_scale = quantize_int8(y)
        return (q.float() / act_scale.unsqueeze(-1)).to(self.out_dtype or y.dtype)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"
