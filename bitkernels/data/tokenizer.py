"""Byte-level BPE: any text can be encoded, and decoding gives it back exactly."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

_BYTES = 256
# Merges are learned from at most this much text: more changes few of a small vocabulary's merges.
TRAINING_CHARACTERS = 4_000_000


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` tokens, the first 256 of them bytes."""
    if vocab_size < _BYTES:
        raise ValueError(f"train_tokenizer: vocab_size must be at least {_BYTES}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(text[:TRAINING_CHARACTERS].splitlines(keepends=True), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """Text -> int64 [T]. Lines are encoded one by one, in parallel, so that newlines stay tokens of their own."""
    encoded = tokenizer.encode_batch_fast(text.splitlines(keepends=True))
    return torch.tensor([token for line in encoded for token in line.ids], dtype=torch.int64)
