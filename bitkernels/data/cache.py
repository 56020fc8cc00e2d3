"""Tokens on disk: a source is encoded once, and memory-mapped by every later run."""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bitkernels.data.documents import Dataset, documents

_VERSION = 1
_DOCUMENTS_AT_ONCE = 4096


@dataclass(frozen=True)
class Tokens:
    """Tokens of documents, one after the other."""

    tokens: np.ndarray  # unsigned [T]
    starts: np.ndarray  # int64 [D], where each document begins

    def __len__(self) -> int:
        return len(self.tokens)


def token_cache(
    sources: Iterable[str | Path | Dataset], tokenizer: Tokenizer, folder: str | Path, column: str = "text"
) -> Tokens:
    """The tokens of ``sources``, read from ``folder`` where it holds them, else encoded and written there.

    What is held is known by the content of the sources and by the tokenizer, not by names or times. The files are
    complete or not there, also where writing them is interrupted, and processes may write the same ones at once.
    Datasets with a ``_fingerprint``, as those of the ``datasets`` library have, are known by it.

    Raises:
        ValueError: as ``documents``; or there is no text.
    """
    sources = list(sources)
    place = Path(folder) / _key(sources, tokenizer, column)
    if not place.is_dir():
        _write(place, sources, tokenizer, column)
    return _open(place)


def _key(sources: list[str | Path | Dataset], tokenizer: Tokenizer, column: str) -> str:
    digest = hashlib.sha256(json.dumps([_VERSION, column, tokenizer.to_str()]).encode())
    for part in itertools.chain.from_iterable(_content(source, column) for source in sources):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def _content(source: str | Path | Dataset, column: str) -> Iterator[bytes]:
    """What a source is known by. Its parts are hashed with their lengths, so that none runs into the next."""
    if not isinstance(source, str | Path):
        fingerprint = getattr(source, "_fingerprint", None)
        yield from [fingerprint.encode()] if fingerprint else (text.encode() for text in documents(source, column))
    elif Path(source).is_dir():
        for file in sorted(Path(source).iterdir()):
            if file.is_file() and not file.name.startswith("."):
                yield from _content(file, column)
    else:
        # The ending says how a file is read.
        yield Path(source).suffix.encode()
        with open(source, "rb") as file:
            while block := file.read(2**20):
                yield block


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Tokens of each text; lines are encoded one by one, as ``encode`` does."""
    lines = [text.splitlines(keepends=True) for text in texts]
    encoded = iter(tokenizer.encode_batch_fast(list(itertools.chain.from_iterable(lines))))
    for own in lines:
        yield [token for _ in own for token in next(encoded).ids]


def _write(place: Path, sources: list[str | Path | Dataset], tokenizer: Tokenizer, column: str) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        count, starts = 0, []
        texts = itertools.chain.from_iterable(documents(source, column) for source in sources)
        with open(temporary / "tokens.bin", "wb") as file:
            while some := list(itertools.islice(texts, _DOCUMENTS_AT_ONCE)):
                for ids in _encode(some, tokenizer):
                    starts.append(count)
                    count += len(ids)
                    file.write(np.array(ids, dtype=dtype).tobytes())
            _sync(file)
        if count == 0:
            raise ValueError("token_cache: the sources hold no text")
        with open(temporary / "starts.bin", "wb") as file:
            file.write(np.array(starts, dtype=np.int64).tobytes())
            _sync(file)
        with open(temporary / "meta.json", "w") as file:
            json.dump({"version": _VERSION, "dtype": dtype.name, "tokens": count, "documents": len(starts)}, file)
            _sync(file)
        try:
            os.rename(temporary, place)
        except OSError:
            if not place.is_dir():  # else another process was faster, with the same files
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _open(place: Path) -> Tokens:
    meta = json.loads((place / "meta.json").read_text())
    parts = {"tokens": (meta["dtype"], meta["tokens"]), "starts": ("int64", meta["documents"])}
    for name, (dtype, length) in parts.items():
        expected, found = length * np.dtype(dtype).itemsize, (place / f"{name}.bin").stat().st_size
        if found != expected:
            raise ValueError(f"{place / name}.bin: must have {expected} bytes, got {found}; delete the folder")
    return Tokens(*(np.memmap(place / f"{name}.bin", dtype, "r", shape=(n,)) for name, (dtype, n) in parts.items()))
