from dataclasses import dataclass

import pytest
import torch
from helpers import TOLERANCE, assert_close, check_compile, check_cuda_graph, noncontiguous, opcheck, wide

import bitkernels
from bitkernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    """A projection [N, K] whose columns [start, start + C) are convolved."""

    batch: int
    N: int
    K: int
    start: int
    C: int
    W: int = 4
    scales: str = "column"
    bias: bool = False

    def __str__(self):
        return f"B{self.batch}-N{self.N}-K{self.K}-C{self.C}-W{self.W}-{self.scales}{'-bias' * self.bias}"


CASES = [
    Case(1, 5, 33, 1, 3),
    Case(1, 200, 1024, 64, 100),
    Case(1, 10576, 256, 5120, 5376),
    Case(2, 130, 96, 30, 70, W=2, scales="row", bias=True),
    Case(3, 130, 256, 0, 130, scales="single"),
    Case(5, 70, 512, 10, 40, W=1),
    Case(8, 648, 640, 300, 340, bias=True),
    Case(8, 64, 256, 8, 16, W=6),
    Case(4, 200, 512, 60, 100, scales="row", bias=True),
    Case(7, 4200, 768, 1000, 1600),
    Case(13, 96, 128, 32, 32),
    Case(17, 456, 256, 40, 300, bias=True),
    Case(130, 392, 256, 100, 270),
    Case(130, 136, 64, 40, 90, scales="row"),
    Case(0, 16, 32, 4, 8),
]


def projection(case, device, acc):
    """norm_weight, w_packed, alpha, beta and bias."""
    shape = {"column": (case.K,), "row": (case.N, 1), "single": (1,)}[case.scales]
    return (
        torch.randn(case.K, device=device, dtype=acc),
        bitkernels.pack_sign(torch.randn(case.N, case.K, device=device)),
        torch.rand(shape, device=device, dtype=acc) + 0.1,
        torch.randn(shape, device=device, dtype=acc) * 0.1,
        torch.randn(case.N, device=device, dtype=acc) if case.bias else None,
    )


def in_inputs(case, device, dtype, state_dtype=None, slots=None):
    """What mamba2_in_step takes, by name."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    norm_weight, w_packed, alpha, beta, bias = projection(case, device, acc)
    return {
        "residual": 3 * torch.randn(case.batch, case.K, device=device, dtype=acc),
        "norm_weight": norm_weight,
        "w_packed": w_packed,
        "alpha": alpha,
        "beta": beta,
        "conv_state": torch.randn(slots or case.batch, case.W - 1, case.C, device=device).to(state_dtype or acc),
        "conv_weight": torch.randn(case.C, case.W, device=device, dtype=acc),
        "conv_bias": torch.randn(case.C, device=device, dtype=acc) if case.bias else None,
        "conv_start": case.start,
        "bias": bias,
        "eps": 1e-3,
    }


def out_inputs(case, device, dtype):
    """What mamba2_out_step takes, by name."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    norm_weight, w_packed, alpha, beta, bias = projection(case, device, acc)
    return {
        "residual": torch.randn(case.batch, case.N, device=device, dtype=acc),
        "y": torch.randn(case.batch, case.K, device=device).to(dtype),
        "norm_weight": norm_weight,
        "w_packed": w_packed,
        "alpha": alpha,
        "beta": beta,
        "bias": bias,
        "eps": 1e-3,
    }


@dataclass
class Layer:
    """A whole layer: H heads of P channels, G groups of N."""

    batch: int
    K: int
    H: int
    P: int
    G: int
    N: int
    scales: str = "column"
    bias: bool = False

    def __str__(self):
        return f"B{self.batch}-K{self.K}-H{self.H}-P{self.P}-G{self.G}-N{self.N}-{self.scales}{'-bias' * self.bias}"


LAYERS = [
    Layer(1, 64, 4, 64, 1, 128),
    Layer(1, 33, 3, 5, 1, 7, bias=True),
    Layer(2, 96, 4, 24, 2, 20, scales="row"),
    Layer(3, 512, 10, 32, 2, 128, bias=True),
    Layer(8, 256, 24, 64, 1, 128),
    Layer(9, 64, 2, 32, 1, 16, scales="single", bias=True),
    Layer(0, 64, 2, 32, 1, 16),
]


def layer_inputs(layer, device, dtype, state_dtype=None, slots=None):
    """What mamba2_step takes, by name."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    inner, both = layer.H * layer.P, 2 * layer.G * layer.N
    width, channels = 2 * inner + both + layer.H, inner + both
    into = Case(layer.batch, width, layer.K, inner, channels, scales=layer.scales, bias=layer.bias)
    given = in_inputs(into, device, dtype, state_dtype, slots)
    given["alpha"] *= layer.K**-0.5  # four columns are multiplied, and fp16 ends at 65504
    names = ("norm", "packed", "alpha", "beta", "bias")
    out = projection(Case(layer.batch, layer.K, inner, 0, 0, scales=layer.scales, bias=layer.bias), device, acc)
    state = torch.randn(slots or layer.batch, layer.H, layer.P, layer.N, device=device)
    return {
        "residual": given["residual"],
        **{f"in_{k}": given[v] for k, v in zip(names, ("norm_weight", "w_packed", *names[2:]), strict=True)},
        **{k: given[k] for k in ("conv_state", "conv_weight", "conv_bias")},
        "ssm_state": state.to(state_dtype or acc),
        "A": -torch.rand(layer.H, device=device, dtype=acc) - 0.1,
        "D": torch.randn(layer.H, device=device, dtype=acc),
        "dt_bias": torch.randn(layer.H, device=device, dtype=acc),
        **{f"out_{k}": v for k, v in zip(names, out, strict=True)},
        "in_eps": 1e-3,
        "out_eps": 1e-4,
    }


def wide_arguments(given):
    return dict(zip(given, wide(*given.values()), strict=True))


@pytest.mark.memcheck
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_step(case, dtype, state_dtype, device):
    given = in_inputs(case, device, dtype, state_dtype)
    ref = wide_arguments(given)
    for _ in range(2):  # the second takes what the first left
        y = bitkernels.mamba2_in_step(**given, dtype=dtype)
        y_ref = reference.mamba2_in_step(**ref)
        assert y.dtype == dtype
        assert_close("y", y, y_ref, max(TOLERANCE[dtype], TOLERANCE[state_dtype]))
    assert_close("conv_state", given["conv_state"], ref["conv_state"], max(TOLERANCE[dtype], TOLERANCE[state_dtype]))


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_step(case, dtype, device):
    given = out_inputs(case, device, dtype)
    ref = wide_arguments(given)
    before = ref["residual"].clone()
    bitkernels.mamba2_out_step(**given)
    reference.mamba2_out_step(**ref)
    assert_close("added", given["residual"].cpu().double() - before, ref["residual"] - before, TOLERANCE[dtype])


MANY_TOKENS = [
    Case(200, 264, 512, 0, 0),
    Case(1000, 264, 512, 0, 0),
    # From 2048 on one product adds, in bf16; widths that are no multiple of four or eight, more and fewer tiles than
    # processors, and rows of K that end within a box or a word.
    Case(2048, 136, 1032, 0, 0, bias=True),
    Case(5000, 2564, 256, 0, 0),
    Case(2060, 130, 256, 0, 0),
    Case(2060, 260, 100, 0, 0),
    Case(2060, 136, 256, 0, 0, scales="row"),
    Case(2060, 136, 250, 0, 0, scales="single", bias=True),
]


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case(1, 72, 96, 0, 0), Case(70, 72, 96, 0, 0, bias=True), *MANY_TOKENS], ids=str)
def test_in_step_without_a_convolution(case, dtype, device):
    given = in_inputs(case, device, dtype) | {"conv_state": None, "conv_weight": None, "conv_bias": None}
    y = bitkernels.mamba2_in_step(**given, dtype=dtype)
    assert_close("y", y, reference.mamba2_in_step(**wide_arguments(given)), TOLERANCE[dtype])
    assert torch.equal(y, bitkernels.mamba2_in_step(**given, dtype=dtype))


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MANY_TOKENS, ids=str)
def test_out_step_of_many_tokens(case, dtype, device):
    given = out_inputs(case, device, dtype)
    ref = wide_arguments(given)
    before = ref["residual"].clone()
    again = {**given, "residual": given["residual"].clone()}
    bitkernels.mamba2_out_step(**given)
    reference.mamba2_out_step(**ref)
    assert_close("added", given["residual"].cpu().double() - before, ref["residual"] - before, TOLERANCE[dtype])
    bitkernels.mamba2_out_step(**again)
    assert torch.equal(again["residual"], given["residual"])


@pytest.mark.memcheck
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_step(layer, state_dtype, device):
    """In fp32; in 16 bits it is its parts to the bit, each of which has a tolerance of its own."""
    given = layer_inputs(layer, device, torch.float32, state_dtype)
    ref = wide_arguments(given)
    before = ref["residual"].clone()
    for _ in range(2):  # the second takes what the first left
        bitkernels.mamba2_step(**given, dtype=torch.float32)
        reference.mamba2_step(**ref)
    tolerance = TOLERANCE[state_dtype]
    assert_close("added", given["residual"].cpu().double() - before, ref["residual"] - before, tolerance)
    assert_close("conv_state", given["conv_state"], ref["conv_state"], tolerance)
    assert_close("ssm_state", given["ssm_state"], ref["ssm_state"], tolerance)


# On Hopper the projections of the second and the third are one kernel each, those of the last several, and states of
# these three are taken in one, four and two turns.
SMALL, FEW, MANY = Layer(3, 64, 4, 16, 2, 24), Layer(8, 256, 16, 64, 1, 128), Layer(8, 128, 64, 64, 1, 128)
MORE = Layer(9, 256, 32, 64, 2, 128)


def some_slots(layer, device):
    """One of them padding, of batch + 2."""
    slots = torch.arange(layer.batch + 2).flip(0)[: layer.batch]
    slots[1] = -1
    return slots.to(device)


@pytest.mark.parametrize("layer", [SMALL, FEW, MANY, MORE], ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_is_its_parts(dtype, stochastic, layer, device):
    """To the bit, in slots of their own too."""
    acc = torch.float32
    given = layer_inputs(layer, device, dtype, dtype if stochastic else acc, slots=layer.batch + 2)
    slots = some_slots(layer, device)
    seed = position = None
    if stochastic:
        seed = torch.arange(layer.batch, device=device) + 3
        position = seed.flip(0)
    own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    bitkernels.mamba2_step(**given, dtype=dtype, state_indices=slots, seed=seed, position=position)

    inner, both = layer.H * layer.P, layer.G * layer.N
    projected = bitkernels.mamba2_in_step(
        own["residual"], own["in_norm"], own["in_packed"], own["in_alpha"], own["in_beta"], own["conv_state"],
        own["conv_weight"], own["conv_bias"], inner, dtype, own["in_bias"], own["in_eps"], slots,
    )  # fmt: skip
    z, x, B, C, dt = projected.split([inner, inner, both, both, layer.H], -1)
    z, x = (t.unflatten(-1, (layer.H, layer.P)) for t in (z, x))
    B, C = (t.unflatten(-1, (layer.G, layer.N)) for t in (B, C))
    y = bitkernels.ssd_step(
        own["ssm_state"], x, dt, own["A"], B, C, own["D"], z, own["dt_bias"], True, state_indices=slots, seed=seed,
        position=position,
    ).flatten(-2)  # fmt: skip
    bitkernels.mamba2_out_step(
        own["residual"], y, own["out_norm"], own["out_packed"], own["out_alpha"], own["out_beta"], own["out_bias"],
        own["out_eps"],
    )  # fmt: skip
    for name in ("residual", "conv_state", "ssm_state"):
        assert torch.equal(given[name], own[name]), name


@pytest.mark.parametrize("layer", [FEW, MORE], ids=str)
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
def test_steps_without_a_pause(state_dtype, layer, device):
    """A step finds what the one right before it left: the same bits as with a pause between them."""
    steps, slots = 12, some_slots(layer, device)
    given = layer_inputs(layer, device, torch.bfloat16, state_dtype, slots=layer.batch + 2)
    paused = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}

    def step(own):
        bitkernels.mamba2_step(**own, dtype=torch.bfloat16, state_indices=slots)

    for _ in range(steps):
        step(paused)
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                step(given)
        graph.replay()
    else:
        for _ in range(steps):
            step(given)
    assert given["residual"].isfinite().all()
    for name in ("residual", "conv_state", "ssm_state"):
        assert torch.equal(given[name], paused[name]), name


def test_float64():
    given = in_inputs(CASES[3], "cpu", torch.float64)
    ref = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    assert_close("y", bitkernels.mamba2_in_step(**given, dtype=torch.float64), reference.mamba2_in_step(**ref))
    assert_close("conv_state", given["conv_state"], ref["conv_state"])
    given = out_inputs(CASES[3], "cpu", torch.float64)
    ref = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    bitkernels.mamba2_out_step(**given)
    reference.mamba2_out_step(**ref)
    assert_close("residual", given["residual"], ref["residual"])
    given = layer_inputs(LAYERS[2], "cpu", torch.float64)
    ref = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    bitkernels.mamba2_step(**given, dtype=torch.float64)
    reference.mamba2_step(**ref)
    for name in ("residual", "conv_state", "ssm_state"):
        assert_close(name, given[name], ref[name])


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
def test_float64_with_inputs_in_fewer_bits(state_dtype):
    given = in_inputs(CASES[3], "cpu", torch.float64, state_dtype)
    ref = wide_arguments(given)
    y = bitkernels.mamba2_in_step(**given, dtype=torch.float64)
    assert_close("y", y, reference.mamba2_in_step(**ref))
    assert_close("conv_state", given["conv_state"], ref["conv_state"], TOLERANCE[state_dtype])


@pytest.mark.parametrize("batch", [1, 4, 8, 20])
def test_as_accurate_as_the_parts(batch, device):
    """In bf16 the fused step errs no more than norm, projection and convolution of its own each."""
    case, dtype = Case(batch, 640, 512, 64, 512), torch.bfloat16
    given = in_inputs(case, device, dtype)
    ref = wide_arguments(given)
    state = given["conv_state"].clone()
    y = bitkernels.mamba2_in_step(**given, dtype=dtype)
    normalised = torch.nn.functional.rms_norm(given["residual"], (case.K,), given["norm_weight"], 1e-3).to(dtype)
    parts = bitkernels.packed_linear(normalised, given["w_packed"], given["alpha"], given["beta"])
    columns = slice(case.start, case.start + case.C)
    parts[:, columns] = bitkernels.causal_conv1d_step(state, parts[:, columns], given["conv_weight"])
    y_ref = reference.mamba2_in_step(**ref)

    def error(out):
        return (out.cpu().double() - y_ref).square().mean().sqrt().item()

    assert error(y) <= 1.1 * error(parts)


@pytest.mark.memcheck
@pytest.mark.parametrize("batch", [1, 3, 5, 12])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_slots(batch, index_dtype, device):
    """A request moves the slot it names; padding and other slots stay."""
    case = Case(batch, 130, 256, 30, 70)
    given = in_inputs(case, device, torch.float32, slots=16)
    slots = torch.tensor([6, -1, 0, 3, -7, 15, 1, 2, 4, 5, 7, 8][:batch], dtype=index_dtype, device=device)
    ref = wide_arguments(given)
    y = bitkernels.mamba2_in_step(**given, dtype=torch.float32, state_indices=slots)
    y_ref = reference.mamba2_in_step(**ref, state_indices=slots.cpu())
    assert_close("y", y, y_ref)
    assert_close("conv_state", given["conv_state"], ref["conv_state"])


def test_noncontiguous(device):
    given = in_inputs(CASES[3], device, torch.float32)
    views = {k: noncontiguous(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    expected = bitkernels.mamba2_in_step(**given, dtype=torch.float32)
    assert torch.equal(bitkernels.mamba2_in_step(**views, dtype=torch.float32), expected)
    assert torch.equal(views["conv_state"], given["conv_state"])
    given = out_inputs(CASES[3], device, torch.float32)
    views = {k: noncontiguous(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    bitkernels.mamba2_out_step(**given)
    bitkernels.mamba2_out_step(**views)
    assert torch.equal(views["residual"], given["residual"])
    given = layer_inputs(LAYERS[2], device, torch.float32)
    views = {k: noncontiguous(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    bitkernels.mamba2_step(**given, dtype=torch.float32)
    bitkernels.mamba2_step(**views, dtype=torch.float32)
    for name in ("residual", "conv_state", "ssm_state"):
        assert torch.equal(views[name], given[name]), name


@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=str)
def test_same_bits_every_run(case, device):
    given = in_inputs(case, device, torch.bfloat16)
    again = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    y = bitkernels.mamba2_in_step(**given, dtype=torch.bfloat16)
    assert torch.equal(bitkernels.mamba2_in_step(**again, dtype=torch.bfloat16), y)
    assert torch.equal(again["conv_state"], given["conv_state"])


@pytest.mark.parametrize("batch", [2, 3, 5, 8])
@pytest.mark.parametrize("case", [(6448, 1536), (1536, 3072)], ids=str)
def test_place_in_a_batch_does_not_matter(case, batch, device):
    """A batch-invariant engine relies on it: a request's bits are the same wherever in the batch it is."""
    case = Case(batch, *case, 100, 300)
    given, out = in_inputs(case, device, torch.bfloat16), out_inputs(case, device, torch.bfloat16)
    rolled = {**given, **{k: given[k].roll(1, 0) for k in ("residual", "conv_state")}}
    rolled_out = {**out, **{k: out[k].roll(1, 0) for k in ("residual", "y")}}
    y = bitkernels.mamba2_in_step(**given, dtype=torch.bfloat16)
    assert torch.equal(bitkernels.mamba2_in_step(**rolled, dtype=torch.bfloat16), y.roll(1, 0))
    assert torch.equal(rolled["conv_state"], given["conv_state"].roll(1, 0))
    bitkernels.mamba2_out_step(**out)
    bitkernels.mamba2_out_step(**rolled_out)
    assert torch.equal(rolled_out["residual"], out["residual"].roll(1, 0))


@pytest.mark.parametrize("layer", LAYERS[:4], ids=str)
def test_same_bits_of_a_layer_every_run(layer, device):
    given = layer_inputs(layer, device, torch.bfloat16)
    again = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    bitkernels.mamba2_step(**given, dtype=torch.bfloat16)
    bitkernels.mamba2_step(**again, dtype=torch.bfloat16)
    for name in ("residual", "conv_state", "ssm_state"):
        assert torch.equal(again[name], given[name]), name


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e15])
def test_extreme_inputs(size, device):
    given = in_inputs(Case(2, 32, 64, 8, 16), device, torch.float32)
    given["residual"] *= size
    ref = wide_arguments(given)
    assert_close("y", bitkernels.mamba2_in_step(**given, dtype=torch.float32), reference.mamba2_in_step(**ref))


def test_opcheck(device):
    given = in_inputs(Case(2, 20, 32, 4, 8, bias=True), device, torch.float32)
    opcheck(torch.ops.bitkernels.mamba2_in_step.default, (), {**given, "dtype": torch.bfloat16}, grad=False)
    given = out_inputs(Case(2, 20, 32, 4, 8, bias=True), device, torch.float32)
    opcheck(torch.ops.bitkernels.mamba2_out_step.default, (), given, grad=False)
    given = layer_inputs(LAYERS[1], device, torch.float32)
    opcheck(torch.ops.bitkernels.mamba2_step.default, (), {**given, "dtype": torch.bfloat16}, grad=False)


def test_compile_and_cuda_graph(device):
    case = CASES[6]
    given, out = in_inputs(case, device, torch.float32), out_inputs(case, device, torch.float32)

    def function(conv_state, residual):
        conv_state, residual = conv_state.clone(), residual.clone()
        y = bitkernels.mamba2_in_step(**{**given, "conv_state": conv_state}, dtype=torch.float32)
        bitkernels.mamba2_out_step(**{**out, "residual": residual})
        return y, conv_state, residual

    args = (given["conv_state"], out["residual"])
    check_compile(function, args)
    if device == "cuda":
        check_cuda_graph(function, args)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"residual": torch.ones(2, 32).bfloat16()}, "mamba2_in_step: residual must be Float, got BFloat16"),
        ({"residual": torch.ones(32)}, r"mamba2_in_step: residual must be \[B, K\], got \[32\]"),
        ({"norm_weight": torch.ones(31)}, r"mamba2_in_step: norm_weight .*got \[31\]"),
        ({"alpha": torch.ones(31)}, r"mamba2_in_step: alpha .*got \[31\]"),
        ({"beta": torch.ones(1)}, r"mamba2_in_step: beta must have alpha's shape"),
        ({"bias": torch.ones(3)}, r"mamba2_in_step: bias .*got \[3\]"),
        ({"conv_state": torch.ones(2, 3, 9)}, r"mamba2_in_step: conv_state .*got \[2, 3, 9\]"),
        ({"conv_state": torch.ones(2, 3, 8).int()}, "mamba2_in_step: conv_state .*got Int"),
        ({"conv_weight": None}, "mamba2_in_step: conv_state and conv_weight must be given together"),
        ({"conv_weight": torch.ones(8)}, r"mamba2_in_step: conv_weight must be \[C, W\], got \[8\]"),
        ({"conv_bias": torch.ones(9)}, r"mamba2_in_step: conv_bias .*got \[9\]"),
        ({"conv_start": 13}, "mamba2_in_step: conv_start must leave room for 8 channels in 20 columns, got 13"),
        ({"state_indices": torch.ones(3).long()}, r"mamba2_in_step: state_indices .*got \[3\]"),
        ({"dtype": torch.int32}, "mamba2_in_step: dtype must be float32, bfloat16 or float16, got Int"),
    ],
)
def test_bad_input(change, words, device):
    given = {**in_inputs(Case(2, 20, 32, 4, 8, bias=True), device, torch.float32), "dtype": torch.float32}
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=words):
        bitkernels.mamba2_in_step(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"residual": torch.ones(2, 21)}, r"mamba2_out_step: residual .*got \[2, 21\]"),
        ({"residual": torch.ones(2, 20).half()}, "mamba2_out_step: residual must be Float, got Half"),
        ({"y": torch.ones(2, 32, dtype=torch.int32)}, "mamba2_out_step: y must be .*got Int"),
        ({"norm_weight": torch.ones(33)}, r"mamba2_out_step: norm_weight .*got \[33\]"),
    ],
)
def test_bad_output_step(change, words, device):
    given = out_inputs(Case(2, 20, 32, 4, 8), device, torch.float32)
    with pytest.raises(ValueError, match=words):
        bitkernels.mamba2_out_step(**{**given, **{k: v.to(device) for k, v in change.items()}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"residual": torch.ones(2, 96).bfloat16()}, "mamba2_step: residual must be Float, got BFloat16"),
        ({"residual": torch.ones(2, 95)}, r"mamba2_step, in_proj: norm_weight .*got \[96\]"),
        ({"in_alpha": torch.ones(31)}, r"mamba2_step, in_proj: alpha .*got \[31\]"),
        ({"out_norm": torch.ones(31)}, r"mamba2_step, out_proj: norm_weight .*got \[31\]"),
        ({"out_packed": torch.ones(95, 3).to(torch.uint32)}, r"mamba2_step, out_proj: .*"),
        ({"conv_weight": torch.ones(177, 4)}, r"mamba2_step: conv_state .*got \[2, 3, 176\]"),
        ({"conv_weight": torch.ones(175, 4), "conv_state": torch.ones(2, 3, 175), "conv_bias": None},
         r"mamba2_step: conv_weight must have H P \+ 2 G N channels, H P = 96 and N = 20, got 175"),
        ({"conv_weight": torch.ones(216, 4), "conv_state": torch.ones(2, 3, 216),
          "in_packed": torch.ones(316, 3).to(torch.uint32), "in_alpha": torch.ones(1), "in_beta": torch.ones(1)},
         "mamba2_step: the number of groups in conv_weight must divide 4 heads, got 3"),
        ({"conv_weight": torch.ones(136, 4), "conv_state": torch.ones(2, 3, 136), "conv_bias": None},
         "mamba2_step: in_packed must have 236 rows, z, x, B, C and dt, got 276"),
        ({"ssm_state": torch.ones(2, 4, 24)}, r"mamba2_step: ssm_state must be \[B, H, P, N\], got \[2, 4, 24\]"),
        ({"ssm_state": torch.ones(3, 4, 24, 20)}, r"mamba2_step: ssm_state .*got \[3, 4, 24, 20\]"),
        ({"A": torch.ones(3)}, r"mamba2_step: A .*got \[3\]"),
        ({"seed": torch.ones(2).long()}, "mamba2_step: seed and position must be given together"),
    ],
)  # fmt: skip
def test_bad_layer(change, words, device):
    given = {**layer_inputs(LAYERS[2], device, torch.float32), "dtype": torch.float32}
    before = {k: given[k].clone() for k in ("residual", "conv_state", "ssm_state")}
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=words):
        bitkernels.mamba2_step(**{**given, **change})
    assert all(torch.equal(given[k], before[k]) for k in before)


def test_slot_out_of_range():
    """On a GPU, where reading the indices would wait for it, such a request is padding."""
    given = in_inputs(Case(2, 20, 32, 4, 8), "cpu", torch.float32)
    with pytest.raises(
        ValueError, match="mamba2_in_step: state_indices must be below the 2 slots of conv_state, got 2"
    ):
        bitkernels.mamba2_in_step(**given, dtype=torch.float32, state_indices=torch.tensor([0, 2]))
