"""Text to tokens: what ships with the package, files and datasets, tokenizers, the cache, and training windows."""

from bitkernels.data.cache import Tokens, token_cache
from bitkernels.data.documents import documents
from bitkernels.data.shipped import shipped_chapters, shipped_model
from bitkernels.data.text import read_text, shipped_text, split_text
from bitkernels.data.tokenizer import encode, train_tokenizer
from bitkernels.data.windows import Batch, Windows

__all__ = [
    "Batch",
    "Tokens",
    "Windows",
    "documents",
    "encode",
    "read_text",
    "shipped_chapters",
    "shipped_model",
    "shipped_text",
    "split_text",
    "token_cache",
    "train_tokenizer",
]
