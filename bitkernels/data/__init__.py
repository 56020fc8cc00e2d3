"""The text that ships with the package, its split, and tokenizers for it."""

from bitkernels.data.text import read_text, shipped_text, split_text
from bitkernels.data.tokenizer import encode, train_tokenizer

__all__ = ["encode", "read_text", "shipped_text", "split_text", "train_tokenizer"]
