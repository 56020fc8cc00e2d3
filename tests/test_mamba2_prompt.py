import pytest
import torch
from helpers import TOLERANCE, assert_close, check_cuda_graph, noncontiguous, opcheck, wide
from test_mamba2_step import Layer, layer_inputs

import bitkernels
from bitkernels import reference

RESULTS = ("residual", "conv_state", "ssm_state")
# T, and B within the layer. Fewer tokens than the convolution remembers, more than a block of the scan; from 2048 on
# products add to the residual, and the scan has its kernel for Hopper where P = 64.
PROMPTS = [
    (1, Layer(2, 64, 4, 16, 1, 16)),
    (2, Layer(1, 33, 3, 5, 1, 7, bias=True)),
    (70, Layer(2, 96, 4, 24, 2, 20, scales="row")),
    (130, Layer(1, 256, 8, 64, 1, 128, bias=True)),
]
LONG = [
    (1030, Layer(2, 128, 4, 64, 1, 128)),
    (2100, Layer(1, 96, 8, 64, 2, 64, scales="single", bias=True)),
]


def prompt_inputs(T, layer, device, dtype, state_dtype=None):
    """What mamba2_prompt takes, by name."""
    given = layer_inputs(layer, device, dtype, state_dtype)
    given["residual"] = 3 * torch.randn(layer.batch, T, layer.K, device=device, dtype=given["residual"].dtype)
    for name, width in (("in", layer.K), ("out", layer.H * layer.P)):  # a layer adds about as much as there is
        for scale in ("alpha", "beta"):
            given[f"{name}_{scale}"] = given[f"{name}_{scale}"] * (
                width**-0.5 if name == "out" or scale == "beta" else 1
            )
    return given


def token_by_token(given):
    """The reference's steps, in float64."""
    ref = dict(zip(given, wide(*given.values()), strict=True))
    residual = ref.pop("residual")
    for t in range(residual.shape[1]):
        own = residual[:, t].clone()
        reference.mamba2_step(own, **ref)
        residual[:, t] = own
    return {"residual": residual, **ref}


def check(given, dtype, state_dtype):
    before, ref = given["residual"].cpu().double(), token_by_token(given)
    bitkernels.mamba2_prompt(**given, dtype=dtype)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[state_dtype])
    assert_close("added", given["residual"].cpu().double() - before, ref["residual"] - before, 2 * tolerance)
    for name in RESULTS[1:]:
        assert_close(name, given[name], ref[name], 2 * tolerance)


@pytest.mark.memcheck
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "layer"), PROMPTS, ids=str)
def test_value(T, layer, dtype, state_dtype, device):
    check(prompt_inputs(T, layer, device, dtype, state_dtype), dtype, state_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "layer"), LONG, ids=str)
def test_long_prompts(T, layer):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    check(prompt_inputs(T, layer, "cuda", torch.bfloat16), torch.bfloat16, torch.float32)


def test_float64():
    given = prompt_inputs(9, Layer(2, 33, 3, 5, 1, 7, bias=True), "cpu", torch.float64)
    ref = token_by_token(given)
    bitkernels.mamba2_prompt(**given, dtype=torch.float64)
    for name in RESULTS:
        assert_close(name, given[name], ref[name])


def test_pieces_of_a_prompt(device):
    """The states carry on: two pieces give what one does."""
    layer = Layer(1, 96, 8, 64, 1, 128)
    whole = prompt_inputs(150, layer, device, torch.bfloat16)
    pieces = {k: v.clone() if k in RESULTS else v for k, v in whole.items()}
    bitkernels.mamba2_prompt(**whole, dtype=torch.bfloat16)
    residual = pieces.pop("residual")
    for piece in (residual[:, :2].clone(), residual[:, 2:].clone()):
        bitkernels.mamba2_prompt(piece, **pieces, dtype=torch.bfloat16)
        residual = torch.cat([residual[:, piece.shape[1] :], piece], 1)
    assert_close("residual", residual, whole["residual"].double(), TOLERANCE[torch.bfloat16])
    for name in RESULTS[1:]:
        assert_close(name, pieces[name], whole[name].double(), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("name", RESULTS)
def test_noncontiguous(name, device):
    given = prompt_inputs(20, Layer(2, 96, 4, 64, 1, 64), device, torch.bfloat16)
    expected = {k: v.clone() if k in RESULTS else v for k, v in given.items()}
    given[name] = noncontiguous(given[name])
    bitkernels.mamba2_prompt(**given, dtype=torch.bfloat16)
    bitkernels.mamba2_prompt(**expected, dtype=torch.bfloat16)
    assert all(torch.equal(given[result], expected[result]) for result in RESULTS)


def test_no_tokens(device):
    given = prompt_inputs(0, Layer(2, 64, 2, 32, 1, 16), device, torch.bfloat16)
    expected = {k: given[k].clone() for k in RESULTS}
    bitkernels.mamba2_prompt(**given, dtype=torch.bfloat16)
    assert all(torch.equal(given[k], expected[k]) for k in RESULTS)


def test_opcheck(device):
    given = prompt_inputs(5, Layer(2, 64, 2, 32, 1, 16, bias=True), device, torch.bfloat16)
    opcheck(torch.ops.bitkernels.mamba2_prompt.default, (), {**given, "dtype": torch.bfloat16}, grad=False)


def test_compile_and_cuda_graph(device):
    given = prompt_inputs(70, Layer(1, 96, 8, 64, 1, 128), device, torch.bfloat16)

    def read(residual):
        own = {k: v.clone() if k in RESULTS else v for k, v in given.items()}
        own["residual"] = residual.clone()
        bitkernels.mamba2_prompt(**own, dtype=torch.bfloat16)
        return own["residual"]

    expected = read(given["residual"])
    assert torch.equal(torch.compile(read, fullgraph=True, backend="aot_eager")(given["residual"]), expected)
    if device == "cuda":
        check_cuda_graph(read, [given["residual"]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.ones(2, 32)}, r"mamba2_prompt: residual must be \[B, T, K\], got \[2, 32\]"),
        ({"conv_state": torch.ones(2, 3, 5)}, "mamba2_prompt: conv_state .*got"),
        ({"conv_weight": torch.ones(97)}, r"mamba2_prompt: conv_weight must be \[C, W\], got \[97\]"),
        ({"conv_weight": torch.ones(97, 4)}, "mamba2_prompt: conv_weight must have .*got 97"),
        ({"ssm_state": torch.ones(1, 2, 32, 16)}, r"mamba2_prompt: ssm_state .*got \[1, 2, 32, 16\]"),
        ({"in_packed": torch.zeros(5, 2, dtype=torch.uint32)}, "in_packed must have 162 rows, .* got 5"),
        ({"A": torch.ones(3)}, r"A .*\[3\]"),
        ({"dtype": torch.int32}, "dtype must be .*got"),
    ],
    ids=str,
)
def test_bad_input(change, message, device):
    given = prompt_inputs(5, Layer(2, 64, 2, 32, 1, 16), device, torch.float32) | {"dtype": torch.float32}
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        bitkernels.mamba2_prompt(**{**given, **change})
