import sys

import pytest
import torch
from helpers import assert_close, check_compile, noncontiguous, opcheck

import bitkernels
from bitkernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M, N, K: rows and columns that are no whole vectors or blocks, and more tokens than a block has.
SHAPES = [
    ((1,), 1, 1),
    ((1,), 67, 129),
    ((3,), 64, 128),
    ((2, 4), 130, 33),
    ((17,), 9, 257),
    ((0,), 5, 8),
    ((4,), 3, 0),
]


def inputs(shape, N, K, device, dtype, weight_dtype):
    """x, weight and scale."""
    x = torch.randn(*shape, K, device=device).to(dtype)
    if weight_dtype == torch.int8:
        weight = torch.randint(-128, 128, (N, K), dtype=torch.int8, device=device)
        return x, weight, torch.rand(N, device=device, dtype=x.dtype if dtype == torch.float64 else torch.float32)
    return x, torch.randn(N, K, device=device).to(weight_dtype), None


def wide(x, weight, scale):
    return x.cpu().double(), weight.cpu().double(), scale if scale is None else scale.cpu().double()


@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "N", "K"), SHAPES, ids=str)
def test_value(shape, N, K, dtype, weight_dtype, device):
    args = inputs(shape, N, K, device, dtype, weight_dtype)
    y = bitkernels.dense_linear(*args)
    assert y.dtype == dtype
    assert_close("y", y, reference.dense_linear(*wide(*args)))


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.int8], ids=str)
def test_float64(weight_dtype):
    args = inputs((3,), 7, 33, "cpu", torch.float64, weight_dtype)
    assert_close("y", bitkernels.dense_linear(*args), reference.dense_linear(*wide(*args)))


def test_double_weight(device):
    args = inputs((3,), 7, 33, device, torch.float32, torch.float64)
    assert_close("y", bitkernels.dense_linear(*args), reference.dense_linear(*wide(*args)))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_tokens_bits_depend_on_nothing_else(weight_dtype):
    x, weight, scale = inputs((9,), 517, 300, "cpu", torch.bfloat16, weight_dtype)
    y = bitkernels.dense_linear(x, weight, scale)
    assert torch.equal(bitkernels.dense_linear(x, weight, scale), y)
    for m in range(9):
        assert torch.equal(bitkernels.dense_linear(x[m], weight, scale), y[m])


def test_noncontiguous(device):
    args = inputs((3,), 67, 129, device, torch.float32, torch.int8)
    expected = bitkernels.dense_linear(*args)
    torch.testing.assert_close(bitkernels.dense_linear(*map(noncontiguous, args)), expected)


def test_infinity_and_nan_stay_in_their_row():
    x, weight, _ = inputs((1,), 9, 35, "cpu", torch.float32, torch.float32)
    weight[3, 34], weight[5, 0] = torch.inf, torch.nan
    y = bitkernels.dense_linear(x, weight)[0]
    assert y[3].isinf()
    assert y[5].isnan()
    assert y.isfinite().sum() == 7


def test_opcheck_and_compile(device):
    for weight_dtype in (torch.bfloat16, torch.int8):
        args = inputs((2, 3), 20, 32, device, torch.float32, weight_dtype)
        opcheck(torch.ops.bitkernels.dense_linear.default, args, grad=False)
        check_compile(bitkernels.dense_linear, args)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(2, 8).int()}, "dense_linear: x must be float32, bfloat16 or float16, got Int"),
        ({"weight": torch.ones(4, 7)}, r"dense_linear: weight must be \[N, 8\], got \[4, 7\]"),
        ({"weight": torch.ones(4, 8).int()}, "dense_linear: weight must be a floating-point tensor, got Int"),
        ({"weight": torch.ones(4, 8).to(torch.int8)}, "dense_linear: scale must be given .*got Char"),
        ({"scale": torch.ones(4)}, "dense_linear: scale must be given .*got Float"),
        ({"weight": torch.ones(4, 8).to(torch.int8), "scale": torch.ones(5)}, r"dense_linear: scale .*got \[5\]"),
    ],
)
def test_bad_input(change, words):
    given = {"x": torch.ones(2, 8), "weight": torch.ones(4, 8), "scale": None}
    with pytest.raises(ValueError, match=words):
        bitkernels.dense_linear(**{**given, **change})


@pytest.mark.parametrize("tokens", [9, 40])
def test_heads_of_many_tokens_where_torch_is_slow(tokens, monkeypatch):
    """Whatever computes them, on whatever CPU."""
    from bitkernels.models import BiMambaConfig, BiMambaForCausalLM
    from bitkernels.nn import Int8Embedding

    config = BiMambaConfig(vocab_size=70, d_model=32, n_layer=1, headdim=16, d_state=8)
    model = BiMambaForCausalLM(config).eval().set_activation_dtype_(torch.bfloat16)
    rounded = Int8Embedding.from_embedding(model.embedding)
    hidden = torch.randn(tokens, 32).bfloat16()
    table = model.embedding.weight.double()
    for has in (True, False):
        monkeypatch.setattr(sys.modules["bitkernels.dense_linear"], "_HAS_AVX512", has)
        with torch.no_grad():
            assert_close("head", model.next_logits(hidden), hidden.double() @ table.T)
            assert_close("int8 head", rounded.logits(hidden), hidden.double() @ table.T, 2e-2)
