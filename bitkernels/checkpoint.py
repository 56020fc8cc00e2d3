"""Checkpoints: one safetensors file with the model's configuration and tokenizer in its metadata.

docs/format.md defines the file. Everything is checked on load, and the error says what is wrong.
"""

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from bitkernels.models import BiMambaConfig, BiMambaForCausalLM
from bitkernels.nn import PackedBitEmbedding, PackedBitLinear, PackedLinear

FORMAT = "bitkernels"
FORMAT_VERSION = "1"
LAYOUT = {"sign": "uint32-lsb-first-1bit", "ternary": "uint32-lsb-first-2bit"}
_KINDS = ("latent", "packed")

_FLOATS = {"F32", "F16", "BF16"}
# What a tensor that is not floating-point is stored as.
_STORED = {torch.uint32: "U32", torch.int8: "I8"}

# Every low bit of the 2-bit codes of a word; also a word of sixteen codes 1.
_LOW_BITS = 0x55555555
_ALL_BITS = 0xFFFFFFFF


class CheckpointError(ValueError):
    """A file that cannot be loaded; the message names the file and says what is wrong with it."""


@dataclass
class Checkpoint:
    model: BiMambaForCausalLM
    tokenizer: Tokenizer | None
    packed: bool
    training: dict[str, Any]


@contextlib.contextmanager
def atomic_file(path: str | Path):
    """Yields a temporary path beside ``path``, which takes its place, on disk, only if all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_packed(model: torch.nn.Module) -> bool:
    return any(isinstance(module, PackedLinear | PackedBitLinear | PackedBitEmbedding) for module in model.modules())


def save_checkpoint(
    path: str | Path,
    model: BiMambaForCausalLM,
    tokenizer: Tokenizer | None = None,
    dense_dtype: torch.dtype | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Writes ``model``, latent or packed, with ``tokenizer``; an interrupted save leaves no file behind.

    ``dense_dtype`` is what embedding, head and full-precision projections are stored in; None keeps the model's.
    ``training`` says how the model was trained, in types of JSON.
    """
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": "packed" if is_packed(model) else "latent",
        "layout": json.dumps(LAYOUT),
        "config": json.dumps(model.config.to_dict()),
        "training": json.dumps(training or {}),
    }
    if tokenizer is not None:
        metadata["tokenizer"] = tokenizer.to_str()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if dense_dtype is not None:
        for name in model.dense_weights:
            tensors[name] = tensors[name].to(dense_dtype)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_header(path: str | Path) -> dict[str, Any]:
    """The safetensors header, ``{tensor name: {dtype, shape, data_offsets}, "__metadata__": {...}}``, checked."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(9)
        length = int.from_bytes(prefix[:8], "little")
        if len(prefix) == 9 and prefix[8:] == b"{" and length > size - 8:
            raise CheckpointError(f"{path}: truncated: its header needs {8 + length} bytes, the file has {size}")
        file.seek(8)
        try:
            if len(prefix) < 9 or length > size - 8:
                raise ValueError
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path}: not a safetensors file") from error
    if size < end:
        raise CheckpointError(f"{path}: truncated: its tensors need {end} bytes, the file has {size}")
    if size > end:
        raise CheckpointError(f"{path}: {size - end} bytes follow the last tensor")
    return header


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a checkpoint, with ``config``, ``layout`` and ``training`` parsed."""
    return _metadata(Path(path), read_header(path))


def _metadata(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    metadata = dict(header.get("__metadata__") or {})
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a safetensors file, but no bitkernels checkpoint by its metadata")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: unknown format version {version!r}; this release reads {FORMAT_VERSION!r}")
    if metadata.get("kind") not in _KINDS:
        raise CheckpointError(f"{path}: kind must be one of {', '.join(_KINDS)}, got {metadata.get('kind')!r}")
    metadata.setdefault("training", "{}")
    for name in ("config", "layout", "training"):
        try:
            metadata[name] = json.loads(metadata[name])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: metadata {name!r} is missing or not JSON") from error
    if metadata["layout"] != LAYOUT:
        raise CheckpointError(f"{path}: unknown layout {metadata['layout']}; this release reads {LAYOUT}")
    return metadata


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Loads what ``save_checkpoint`` wrote.

    Args:
        path: the file.
        device: where the model goes.
        dtype: of the activations, to which embedding, head and full-precision projections are cast.

    Raises:
        CheckpointError: the file is no checkpoint, of another version, damaged, or inconsistent.
    """
    path = Path(path)
    header = read_header(path)
    metadata = _metadata(path, header)
    try:
        config = BiMambaConfig.from_dict(metadata["config"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    packed = metadata["kind"] == "packed"
    model = BiMambaForCausalLM.on_meta(config, packed)
    _check_tensors(path, header, model.state_dict())
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_values(path, model, tensors)
    model.load_state_dict(tensors, assign=True)
    model.to(device)
    model.set_activation_dtype_(dtype)
    return Checkpoint(model.eval(), _tokenizer(path, metadata, config), packed, metadata["training"])


def _tokenizer(path: Path, metadata: dict[str, Any], config: BiMambaConfig) -> Tokenizer | None:
    if "tokenizer" not in metadata:
        return None
    try:
        tokenizer = Tokenizer.from_str(metadata["tokenizer"])
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: its tokenizer cannot be read ({error})") from error
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"{path}: its tokenizer has {tokenizer.get_vocab_size()} tokens, the model {config.vocab_size}"
        )
    return tokenizer


def _check_tensors(path: Path, header: dict[str, Any], expected: dict[str, Tensor]) -> None:
    found = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if missing := sorted(set(expected) - set(found)):
        raise CheckpointError(f"{path}: missing tensors: {_some(missing)}")
    if unexpected := sorted(set(found) - set(expected)):
        raise CheckpointError(f"{path}: unexpected tensors: {_some(unexpected)}")
    for name, tensor in expected.items():
        entry = found[name]
        dtypes = _FLOATS if tensor.is_floating_point() else {_STORED[tensor.dtype]}
        if entry["dtype"] not in dtypes:
            raise CheckpointError(f"{path}: {name} must be {' or '.join(sorted(dtypes))}, got {entry['dtype']}")
        if entry["shape"] != list(tensor.shape):
            raise CheckpointError(f"{path}: {name} must be of shape {list(tensor.shape)}, got {entry['shape']}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _check_values(path: Path, model: BiMambaForCausalLM, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        # aminmax makes no mask of the tensor's size, and passes NaN on.
        if tensor.is_floating_point() and not all(map(torch.isfinite, tensor.aminmax() if tensor.numel() else ())):
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(f"{path}: {name} holds {count} non-finite values")
    for name, module in model.named_modules():
        words = tensors.get(f"{name}.w_packed")
        if isinstance(module, PackedLinear):
            _check_padding(path, name, words, module.in_features, bits=1, padding=0)
        elif isinstance(module, PackedBitLinear | PackedBitEmbedding):
            width = module.in_features if isinstance(module, PackedBitLinear) else module.embedding_dim
            bad = _signed(words) & (_signed(words) >> 1) & _LOW_BITS
            if bool(bad.any()):
                row, word = bad.nonzero()[0].tolist()
                raise CheckpointError(f"{path}: {name}.w_packed holds the invalid code 3 (row {row}, word {word})")
            _check_padding(path, name, words, width, bits=2, padding=_LOW_BITS)


def _check_padding(path: Path, name: str, words: Tensor, width: int, bits: int, padding: int) -> None:
    used = width * bits % 32
    if used == 0 or words.numel() == 0:
        return
    mask = _ALL_BITS ^ ((1 << used) - 1)
    # int64, so that the masks need no sign.
    wrong = (_signed(words[:, -1]).long() & mask) != (padding & mask)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise CheckpointError(f"{path}: {name}.w_packed has padding bits set to other than padding (row {row})")


def _signed(words: Tensor) -> Tensor:
    """The same bits as int32, which torch can shift and compare."""
    return words.view(torch.int32)
