"""Checkpoints: round trips, and for each kind of damage the error that names it."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitkernels.checkpoint import CheckpointError, atomic_file, load_checkpoint, read_header, save_checkpoint
from bitkernels.data import train_tokenizer
from bitkernels.models import BiMambaConfig, BiMambaForCausalLM
from bitkernels.nn import pack_

# in_proj has K = 24, so that words have padding.
SHAPE = BiMambaConfig(vocab_size=300, d_model=24, n_layer=1, headdim=8, d_state=4, binarize="all")
IN_PROJ = "layers.0.mixer.in_proj"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("In the beginning God created the heaven and the earth.\n" * 20, 300)


@pytest.fixture
def model():
    return BiMambaForCausalLM(SHAPE).eval()


@pytest.fixture
def packed_file(tmp_path, model, tokenizer):
    path = tmp_path / "packed.safetensors"
    save_checkpoint(path, pack_(model), tokenizer)
    return path


@pytest.fixture
def ternary_file(tmp_path):
    path = tmp_path / "ternary.safetensors"
    save_checkpoint(path, pack_(BiMambaForCausalLM(SHAPE.replace(weight_format="ternary"))))
    return path


def rewrite(path, change_tensors=None, **metadata):
    """The same file with changed tensors or metadata."""
    tensors, old = load_file(path), read_header(path)["__metadata__"]
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path, {k: v for k, v in {**old, **metadata}.items() if v is not None})


@torch.no_grad()
@pytest.mark.parametrize("weight_format", ["binary", "ternary"])
@pytest.mark.parametrize("packed", [False, True])
def test_round_trip(tmp_path, tokenizer, weight_format, packed):
    model = BiMambaForCausalLM(SHAPE.replace(weight_format=weight_format)).eval()
    if packed:
        pack_(model)
    path = tmp_path / "deep" / "model.safetensors"
    save_checkpoint(path, model, tokenizer)
    loaded = load_checkpoint(path)
    assert loaded.packed == packed
    assert loaded.model.config == model.config
    for name, tensor in model.state_dict().items():
        assert loaded.model.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(loaded.model.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name
    ids = torch.randint(300, (1, 9))
    assert torch.equal(loaded.model(ids), model(ids))
    assert loaded.tokenizer.to_str() == tokenizer.to_str()
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_activation_dtype_on_load(packed_file):
    model = load_checkpoint(packed_file, dtype=torch.bfloat16).model
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.layers[0].mixer.in_proj.alpha.dtype == torch.float32


def test_dense_dtype_on_disk(tmp_path, model):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, dense_dtype=torch.bfloat16)
    assert {n for n, e in read_header(path).items() if e.get("dtype") == "BF16"} == {"embedding.weight"}
    loaded = load_checkpoint(path).model.embedding.weight
    assert torch.equal(loaded, model.embedding.weight.bfloat16().float())


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("keep", [4, 8, 200, -1])
def test_truncated(packed_file, keep):
    data = packed_file.read_bytes()
    packed_file.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="truncated" if keep != 4 and keep != 8 else "not a safetensors file"):
        load_checkpoint(packed_file)


@pytest.mark.parametrize("data", [b"", b"hello, this is no model", b"\0" * 64, b"\x05\0\0\0\0\0\0\0[1,2]"])
def test_not_safetensors(tmp_path, data):
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"not a safetensors file|bytes follow"):
        load_checkpoint(path)


def test_trailing_bytes(packed_file):
    packed_file.write_bytes(packed_file.read_bytes() + b"xy")
    with pytest.raises(CheckpointError, match="2 bytes follow"):
        load_checkpoint(packed_file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": None}, "no bitkernels checkpoint"),
        ({"format_version": "7"}, "unknown format version '7'"),
        ({"kind": "squeezed"}, "kind must be one of latent, packed"),
        ({"layout": json.dumps({"sign": "msb"})}, "unknown layout"),
        ({"config": None}, "'config' is missing"),
        ({"config": "{}"}, "missing fields"),
        ({"config": json.dumps({**SHAPE.to_dict(), "depth": 3})}, "unknown fields depth"),
        ({"config": json.dumps({**SHAPE.to_dict(), "n_layer": 2})}, "missing tensors: layers.1"),
        ({"config": json.dumps({**SHAPE.to_dict(), "d_state": 5})}, "must be of shape"),
        ({"tokenizer": "{}"}, "tokenizer cannot be read"),
        ({"kind": "latent"}, "missing tensors"),
    ],
)
def test_bad_metadata(packed_file, metadata, message):
    rewrite(packed_file, **metadata)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(packed_file)


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


def poke(name, index, value):
    def change(tensors):
        tensor = tensors[name]
        (tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor)[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("norm.weight"), "missing tensors: norm.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected tensors: extra"),
        (replace(f"{IN_PROJ}.w_packed", lambda w: w.view(torch.int32)), "w_packed must be U32, got I32"),
        (replace(f"{IN_PROJ}.alpha", lambda a: a.double()), "alpha must be BF16 or F16 or F32, got F64"),
        (replace(f"{IN_PROJ}.alpha", lambda a: a[:, :-1].clone()), r"alpha must be of shape \[1, 24\]"),
        (poke(f"{IN_PROJ}.alpha", (0, 3), float("nan")), "alpha holds 1 non-finite values"),
        (poke(f"{IN_PROJ}.beta", (0, 3), float("inf")), "beta holds 1 non-finite values"),
        (poke(f"{IN_PROJ}.w_packed", (2, 0), -1), r"padding bits .*row 2"),
    ],
)
def test_bad_tensors(packed_file, change, message):
    rewrite(packed_file, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(packed_file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poke(f"{IN_PROJ}.w_packed", (1, 0), 0x55555557), r"invalid code 3 \(row 1, word 0\)"),
        (poke(f"{IN_PROJ}.w_packed", (1, 1), 0x15555555), r"padding bits .*row 1"),
        (poke(f"{IN_PROJ}.scale", 0, float("nan")), "scale holds 1 non-finite"),
    ],
)
def test_bad_ternary_tensors(ternary_file, change, message):
    load_checkpoint(ternary_file)
    rewrite(ternary_file, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(ternary_file)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.safetensors")
