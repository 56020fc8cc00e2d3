"""Teachers: any causal language model over the student's vocabulary, and logits that are stored on disk."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bitkernels.checkpoint import load_checkpoint

_LOGITS, _KEYS, _META = "logits.bin", "keys.bin", "logits.json"
_KEY_BYTES = 16


@dataclass
class Teacher:
    """A module that maps ids [B, T] to logits [B, T, vocab_size], or to an object whose ``logits`` they are."""

    model: nn.Module
    tokenizer: Tokenizer
    vocab_size: int  # of the logits, which may be padded beyond the tokenizer's
    training: dict[str, Any] = field(default_factory=dict)  # of a checkpoint of this package


def load_teacher(path: str | Path, device: torch.device | str = "cpu") -> Teacher:
    """The teacher that is at ``path``, with its tokenizer, which is the student's.

    A file is a checkpoint of this package. A folder is what ``store_logits`` wrote, or a causal language model of the
    ``transformers`` library with a ``tokenizer.json``; nothing is downloaded.

    Raises:
        ValueError: there is no tokenizer.
        ImportError: the folder needs ``transformers``, which is not installed.
    """
    path = Path(path)
    if not path.is_dir():
        checkpoint = load_checkpoint(path, device)
        if checkpoint.tokenizer is None:
            raise ValueError(f"{path}: a teacher needs its tokenizer in the checkpoint")
        vocab_size = checkpoint.model.config.vocab_size
        return Teacher(checkpoint.model, checkpoint.tokenizer, vocab_size, checkpoint.training)
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path}: a teacher's folder needs a tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    if (path / _META).is_file():
        stored = StoredLogits(path)
        return Teacher(stored, tokenizer, stored.vocab_size)
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(f"{path}: reading it needs the transformers library") from error
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    return Teacher(model.to(device).eval().requires_grad_(False), tokenizer, model.config.vocab_size)


def _key(row: Tensor) -> bytes:
    return hashlib.blake2b(row.cpu().to(torch.int64).numpy().tobytes(), digest_size=_KEY_BYTES).digest()


@torch.no_grad()
def store_logits(
    folder: str | Path,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes the logits of a teacher for windows of tokens, for ``StoredLogits`` to read.

    Args:
        folder: made where it does not exist; ``tokenizer.json`` is put there too.
        teacher: as ``Teacher.model``.
        batches: int [B, T] each, with one T: the inputs that the run will see.
        tokenizer: the teacher's.
        dtype: float16 or float32; the size on disk is ``windows * T * vocab_size`` of them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    shape, windows = None, 0
    with open(folder / _LOGITS, "wb") as logits_file, open(folder / _KEYS, "wb") as keys_file:
        for ids in batches:
            out = teacher(ids)
            logits = getattr(out, "logits", out).to(dtype).cpu()
            if shape not in (None, list(logits.shape[1:])):
                raise ValueError(f"store_logits: windows must have one shape, got {shape} and {list(logits.shape[1:])}")
            shape, windows = list(logits.shape[1:]), windows + len(logits)
            logits_file.write(logits.contiguous().numpy().tobytes())
            keys_file.write(b"".join(_key(row) for row in ids))
    if shape is None:
        raise ValueError("store_logits: there are no windows")
    meta = {"windows": windows, "length": shape[0], "vocab_size": shape[1], "dtype": str(dtype).removeprefix("torch.")}
    (folder / _META).write_text(json.dumps(meta))


class StoredLogits(nn.Module):
    """A teacher whose logits are on disk: looks up each window [T] of ids by its content.

    Raises ValueError for a window that was not stored.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.folder = Path(folder)
        meta = json.loads((self.folder / _META).read_text())
        self.vocab_size = meta["vocab_size"]
        shape = (meta["windows"], meta["length"], self.vocab_size)
        self._logits = np.memmap(self.folder / _LOGITS, meta["dtype"], "r", shape=shape)
        keys = (self.folder / _KEYS).read_bytes()
        self._rows = {keys[i * _KEY_BYTES : (i + 1) * _KEY_BYTES]: i for i in range(meta["windows"])}

    def forward(self, ids: Tensor) -> Tensor:
        rows = [self._rows.get(_key(row)) for row in ids]
        if None in rows:
            raise ValueError(f"{self.folder}: holds no logits for window {rows.index(None)} of the batch")
        return torch.from_numpy(self._logits[rows]).to(ids.device)
