from dataclasses import dataclass

import pytest
import torch
from helpers import TOLERANCE, assert_close, check_compile, check_cuda_graph, noncontiguous, opcheck, wide

import bitkernels
from bitkernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


@dataclass
class Case:
    batch: int
    H: int
    P: int
    N: int
    G: int = 1
    D: str = ""  # "H", "HP"
    z: bool = False
    dt_bias: bool = True

    def __str__(self):
        return f"B{self.batch}-H{self.H}-P{self.P}-N{self.N}-G{self.G}{f'-D{self.D}' if self.D else ''}{'-z' * self.z}"


CASES = [
    Case(1, 1, 1, 1),
    Case(1, 4, 64, 128, D="H", z=True),
    Case(3, 4, 33, 17, G=2, D="HP", z=True),
    Case(2, 2, 16, 31, G=2, dt_bias=False),
    Case(2, 6, 32, 64, G=6, D="H"),
    Case(0, 2, 16, 16),
]


def inputs(case, device, dtype, state_dtype=None):
    """state, x, dt, A, B, C, D, z, dt_bias"""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    batch, H, P, N, G = case.batch, case.H, case.P, case.N, case.G
    tensors = [
        torch.randn(batch, H, P, N).to(state_dtype or acc),
        torch.randn(batch, H, P).to(dtype),
        (torch.randn(batch, H) * 2 - 2).to(acc),
        (-1 - 15 * torch.rand(H)).to(acc),
        torch.randn(batch, G, N).to(dtype),
        torch.randn(batch, G, N).to(dtype),
        torch.randn(*((H, P) if case.D == "HP" else (H,))).to(acc) if case.D else None,
        torch.randn(batch, H, P).to(dtype) if case.z else None,
        torch.randn(H).to(acc) if case.dt_bias else None,
    ]
    return [None if t is None else t.to(device) for t in tensors]


@pytest.mark.memcheck
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case, dtype, state_dtype, device):
    tensors = inputs(case, device, dtype, state_dtype)
    tensors_ref = wide(*tensors)
    y = bitkernels.ssd_step(*tensors, dt_softplus=True, dt_limit=(0.001, 5.0))
    y_ref = reference.ssd_step(*tensors_ref, dt_softplus=True, dt_limit=(0.001, 5.0))
    assert y.dtype == dtype
    assert tensors[0].dtype == state_dtype
    assert_close("y", y, y_ref)
    assert_close("state", tensors[0], tensors_ref[0])


def test_float64():
    tensors = inputs(CASES[2], "cpu", torch.float64)
    tensors_ref = [t.clone() for t in tensors]
    assert_close("y", bitkernels.ssd_step(*tensors), reference.ssd_step(*tensors_ref))
    assert_close("state", tensors[0], tensors_ref[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_equal_the_scan(dtype, device):
    T, case = 40, Case(2, 4, 32, 16, G=2, D="H", z=True)
    state, _, _, A, _, _, D, _, dt_bias = inputs(case, device, dtype)
    x, z = (torch.randn(2, T, 4, 32, device=device).to(dtype) for _ in range(2))
    B, C = (torch.randn(2, T, 2, 16, device=device).to(dtype) for _ in range(2))
    dt = torch.randn(2, T, 4, device=device)
    y, final_states = bitkernels.ssd_scan(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial_states=state, dt_softplus=True, return_final_states=True
    )
    steps = [
        bitkernels.ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, z[:, t], dt_bias, dt_softplus=True)
        for t in range(T)
    ]
    assert_close("y", torch.stack(steps, 1), y.double(), TOLERANCE[dtype])
    assert_close("state", state, final_states.double(), TOLERANCE[dtype])


def test_noncontiguous(device):
    tensors = inputs(CASES[2], device, torch.float32)
    views = [None if t is None else noncontiguous(t) for t in tensors]
    y, y_views = bitkernels.ssd_step(*tensors), bitkernels.ssd_step(*views)
    assert_close("y", y, y_views.double())
    assert_close("state", tensors[0], views[0].double())


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_run(state_dtype, device):
    tensors = inputs(CASES[1], device, torch.bfloat16, state_dtype)
    again = [None if t is None else t.clone() for t in tensors]
    assert torch.equal(bitkernels.ssd_step(*tensors), bitkernels.ssd_step(*again))
    assert torch.equal(tensors[0], again[0])


def test_opcheck(device):
    tensors = inputs(Case(2, 2, 4, 3, D="HP", z=True), device, torch.float32)
    opcheck(torch.ops.bitkernels.ssd_step.default, (*tensors, True, 0.001, 1.0), grad=False)


def test_compile_and_cuda_graph(device):
    tensors = inputs(CASES[4], device, torch.float32)

    def function(state, *rest):
        state = state.clone()
        return bitkernels.ssd_step(state, *rest, dt_softplus=True), state

    check_compile(function, tensors)
    if device == "cuda":
        check_cuda_graph(function, tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": torch.ones(2, 4, 16, 7)}, r"ssd_step: state .*got \[2, 4, 16, 7\]"),
        ({"state": torch.ones(2, 4, 16, 8, dtype=torch.int32)}, "ssd_step: state .*Int"),
        ({"x": torch.ones(2, 64)}, r"ssd_step: x must be \[B, H, P\], got \[2, 64\]"),
        ({"dt": torch.ones(2, 3)}, r"ssd_step: dt .*got \[2, 3\]"),
        ({"A": torch.ones(3)}, r"ssd_step: A .*got \[3\]"),
        ({"B": torch.ones(2, 3, 8)}, r"ssd_step: B .*divides 4 heads"),
        ({"C": torch.ones(2, 2, 7)}, r"ssd_step: C .*got \[2, 2, 7\]"),
        ({"D": torch.ones(3)}, r"ssd_step: D .*got \[3\]"),
        ({"z": torch.ones(2, 4, 15)}, r"ssd_step: z .*got \[2, 4, 15\]"),
        ({"dt_bias": torch.ones(3)}, r"ssd_step: dt_bias .*got \[3\]"),
    ],
)
def test_bad_input(change, words, device):
    good = dict(zip(NAMES, inputs(Case(2, 4, 16, 8, G=2, D="H", z=True), device, torch.float32), strict=True))
    with pytest.raises(ValueError, match=words):
        bitkernels.ssd_step(**{**good, **{k: v.to(device) for k, v in change.items()}})
