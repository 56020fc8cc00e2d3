"""Layers: initialisation, latent against packed, conversion of whole models."""

import copy

import pytest
import torch
from helpers import assert_close
from torch import nn

from bitkernels import reference
from bitkernels.nn import (
    BitEmbedding,
    BitLinear,
    FBILinear,
    PackedBitEmbedding,
    PackedBitLinear,
    PackedLinear,
    binarize_,
    pack_,
    packed_zeros,
)

SIZES = [(1, 1), (31, 5), (32, 8), (33, 7), (100, 3)]
SCALES = ["column", "row", "single"]


@pytest.mark.parametrize("scales", SCALES)
def test_fbi_linear_starts_as_published(scales):
    layer = FBILinear(10, 6, scales=scales)
    axis = {"column": 0, "row": 1, "single": (0, 1)}[scales]
    w = layer.weight.detach()
    beta = w.mean(axis, keepdim=True)
    alpha = (w - beta).abs().mean(axis, keepdim=True)
    assert tuple(layer.alpha.shape) == {"column": (1, 10), "row": (6, 1), "single": (1,)}[scales]
    torch.testing.assert_close(layer.alpha.detach(), alpha.view_as(layer.alpha))
    torch.testing.assert_close(layer.beta.detach(), beta.view_as(layer.beta))


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("K", "N"), SIZES)
def test_packed_linear_equals_latent(device, scales, K, N):
    layer = FBILinear(K, N, scales=scales, device=device)
    x = torch.randn(2, 3, K, device=device)
    packed = PackedLinear.from_latent(layer)
    expected = reference.sign_linear(*(t.double() for t in (x, layer.weight, layer.alpha, layer.beta, layer.bias)))
    assert_close("latent", layer(x), expected)
    assert_close("packed", packed(x), expected)


def test_fbi_linear_trains_everything():
    layer = FBILinear(33, 7)
    layer(torch.randn(5, 33)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_autocast_casts_x_only(device):
    for layer in (FBILinear(32, 8, device=device), BitLinear(32, 8, device=device)):
        dtypes = {name: p.dtype for name, p in layer.named_parameters()}
        with torch.autocast(device, torch.bfloat16):
            y = layer(torch.randn(4, 32, device=device))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert {name: p.grad.dtype for name, p in layer.named_parameters()} == dtypes


def test_published_names_load():
    source, layer = FBILinear(12, 4, bias=False), FBILinear(12, 4, bias=False)
    layer.load_state_dict({"weight": source.weight, "wscale": source.alpha, "wbias": source.beta})
    assert torch.equal(layer.alpha, source.alpha)
    assert torch.equal(layer.beta, source.beta)


def test_packed_words_survive_casts_and_copies():
    packed = PackedLinear.from_latent(FBILinear(40, 6))
    words = packed.w_packed.clone()
    for other in (copy.deepcopy(packed), copy.deepcopy(packed).to(torch.bfloat16)):
        assert other.w_packed.dtype == torch.uint32
        assert torch.equal(other.w_packed.view(torch.int32), words.view(torch.int32))
    assert packed.to(torch.bfloat16).alpha.dtype == torch.bfloat16
    fresh = PackedLinear(40, 6)
    fresh.load_state_dict(PackedLinear.from_latent(FBILinear(40, 6)).state_dict())
    assert fresh.w_packed.dtype == torch.uint32


def test_zeros_are_counted():
    layer = FBILinear(32, 4)
    with torch.no_grad():
        layer.weight[0, :3] = 0
    model = pack_(nn.Sequential(layer))
    assert packed_zeros(model) == 3
    assert torch.equal(reference.unpack_sign(model[0].w_packed, 32)[0, :3], torch.ones(3))


@pytest.mark.parametrize("act_bits", [8, None])
@pytest.mark.parametrize(("K", "N"), SIZES)
def test_packed_bit_linear_equals_latent(device, act_bits, K, N):
    layer = BitLinear(K, N, bias=True, act_bits=act_bits, device=device)
    nn.init.uniform_(layer.norm_weight, 0.5, 1.5)
    packed = PackedBitLinear.from_latent(layer)
    q, scale = reference.quantize_ternary(layer.weight.detach())
    assert torch.equal(reference.unpack_ternary(packed.w_packed, K), q)
    torch.testing.assert_close(packed.scale, scale)
    x = torch.randn(4, K, device=device)
    assert_close("packed", packed(x), layer(x).double())


def test_packed_bit_embedding_equals_latent(device):
    layer = BitEmbedding(11, 21, device=device)
    nn.init.uniform_(layer.norm_weight, 0.5, 1.5)
    nn.init.uniform_(layer.norm_bias, -0.5, 0.5)
    ids = torch.randint(11, (2, 5), device=device)
    packed = PackedBitEmbedding.from_latent(layer)
    assert_close("packed", packed(ids), layer(ids).double())
    assert packed(ids).shape == (2, 5, 21)


def toy_model():
    return nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 9, bias=False))


def test_conversion_takes_what_the_filter_takes():
    model = binarize_(toy_model(), filter=lambda name, module: name == "1")
    assert [type(m) for m in model] == [nn.Embedding, FBILinear, nn.ReLU, nn.Linear]
    model = binarize_(toy_model(), filter=lambda name, module: True, format="ternary")
    assert [type(m) for m in model] == [BitEmbedding, BitLinear, nn.ReLU, BitLinear]
    pack_(model, filter=lambda name, module: name != "3")
    assert [type(m) for m in model] == [PackedBitEmbedding, PackedBitLinear, nn.ReLU, BitLinear]


@pytest.mark.parametrize("format", ["binary", "ternary"])
def test_converted_model_equals_packed_model(format):
    model = binarize_(toy_model(), format=format)
    ids = torch.randint(9, (4, 6))
    latent = model(ids)
    assert_close("packed", pack_(model)(ids), latent.double())


def test_a_shared_layer_stays_shared():
    shared = nn.Linear(8, 8)
    model = binarize_(nn.Sequential(shared, nn.ReLU(), shared))
    assert isinstance(model[0], FBILinear)
    assert model[0] is model[2]
    pack_(model)
    assert model[0] is model[2]


def test_the_model_itself_can_be_the_layer():
    assert isinstance(pack_(binarize_(nn.Linear(8, 4))), PackedLinear)


@pytest.mark.parametrize("name", ["weight", "alpha", "beta", "bias"])
def test_packing_names_what_is_not_finite(name):
    model = nn.Sequential(FBILinear(8, 4))
    with torch.no_grad():
        getattr(model[0], name).flatten()[0] = float("nan")
    with pytest.raises(ValueError, match=f"0: {name} must be finite"):
        pack_(model)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="scales must be one of"):
        FBILinear(4, 4, scales="diagonal")
    with pytest.raises(ValueError, match=r"FBILinear: x must be \[..., 4\]"):
        FBILinear(4, 4)(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"PackedLinear: x must be \[..., 4\]"):
        PackedLinear(4, 4)(torch.randn(2, 5))
    with pytest.raises(ValueError, match="format must be"):
        binarize_(toy_model(), format="quaternary")
    with pytest.raises(ValueError, match="no binary form"):
        binarize_(toy_model(), filter=lambda name, module: True)
