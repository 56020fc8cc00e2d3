"""Layers with 1-bit and ternary weights: latent forms for training, packed forms for inference."""

from bitkernels.nn.binary import FBILinear, PackedLinear
from bitkernels.nn.convert import binarize_, pack_, packed_zeros
from bitkernels.nn.int8 import Int8Embedding
from bitkernels.nn.ternary import BitEmbedding, BitLinear, PackedBitEmbedding, PackedBitLinear

__all__ = [
    "BitEmbedding",
    "BitLinear",
    "FBILinear",
    "Int8Embedding",
    "PackedBitEmbedding",
    "PackedBitLinear",
    "PackedLinear",
    "binarize_",
    "pack_",
    "packed_zeros",
]
