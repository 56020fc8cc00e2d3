from dataclasses import dataclass

import pytest
import torch
from helpers import (
    TOLERANCE,
    assert_close,
    check_compile,
    check_compiled_gradients,
    check_cuda_graph,
    noncontiguous,
    opcheck,
    wide,
)

import bitkernels
from bitkernels import reference
from bitkernels.mamba2_mixer import gated_mixer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = (
    "zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight", "initial_conv_state", "initial_states",
    "seq_idx", "cu_seqlens",
)  # fmt: skip


@dataclass
class Case:
    batch: int
    T: int
    H: int
    P: int
    N: int
    G: int = 1
    W: int = 4
    D: str = "H"  # "", "HP"
    conv_bias: bool = True
    initial: bool = False
    seq_idx: bool = False
    cu_seqlens: tuple[int, ...] = ()
    norm_group_size: int | None = None

    def __str__(self):
        options = [o for o in ("initial", "seq_idx", "cu_seqlens") if getattr(self, o)]
        return "-".join([f"B{self.batch}-T{self.T}-H{self.H}-P{self.P}-N{self.N}-G{self.G}", *options])


CASES = [
    Case(1, 1, 1, 4, 3, D="", conv_bias=False),
    Case(2, 70, 4, 16, 16, G=2, norm_group_size=32),
    Case(2, 40, 2, 32, 24, D="HP", initial=True, seq_idx=True),
    Case(1, 90, 4, 16, 20, W=3, initial=True, cu_seqlens=(0, 1, 33, 33, 90)),
]


def inputs(case, device, dtype, requires_grad=False):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    width, channels = case.H * case.P, case.H * case.P + 2 * case.G * case.N
    sequences = len(case.cu_seqlens) - 1 if case.cu_seqlens else case.batch
    # The step sizes of a trained model: 1e-3 to 0.1.
    step = 10 ** (torch.rand(case.H, dtype=torch.float64) * 2 - 3)
    tensors = [
        torch.randn(case.batch, case.T, width + channels + case.H).to(dtype),
        torch.randn(channels, case.W).to(acc) / 2,
        torch.randn(channels).to(acc) / 2 if case.conv_bias else None,
        step.expm1().log().to(acc),
        (-1 - 15 * torch.rand(case.H)).to(acc),
        torch.randn(*((case.H, case.P) if case.D == "HP" else (case.H,))).to(acc) if case.D else None,
        torch.randn(width).to(acc),
        torch.randn(sequences, case.W - 1, channels).to(dtype) if case.initial else None,
        torch.randn(sequences, case.H, case.P, case.N).to(acc) if case.initial else None,
        torch.randint(0, 4, (case.batch, case.T)).sort(1).values.int() if case.seq_idx else None,
        torch.tensor(case.cu_seqlens, dtype=torch.int32) if case.cu_seqlens else None,
    ]
    tensors = [None if t is None else t.to(device) for t in tensors]
    for t in tensors:
        if t is not None and t.is_floating_point():
            t.requires_grad_(requires_grad)
    return tensors


def run(case, tensors):
    options = {"ngroups": case.G, "norm_group_size": case.norm_group_size, "return_final_states": True}
    return bitkernels.mamba2_mixer(*tensors, **options)


def composed(case, tensors):
    """The same of the public functions."""
    zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, initial_conv, initial, seq_idx, cu_seqlens = tensors
    width, state = case.H * case.P, case.G * case.N
    z, xbc, dt = zxbcdt.split([width, width + 2 * state, case.H], -1)
    xbc = bitkernels.causal_conv1d(xbc, conv_weight, conv_bias, initial_conv, seq_idx, cu_seqlens)
    x, B, C = xbc.split([width, state, state], -1)
    y, final_states = bitkernels.ssd_scan(
        x.unflatten(-1, (case.H, case.P)), dt, A, B.unflatten(-1, (case.G, -1)), C.unflatten(-1, (case.G, -1)), D=D,
        dt_bias=dt_bias, initial_states=initial, seq_idx=seq_idx, cu_seqlens=cu_seqlens, dt_softplus=True,
        return_final_states=True,
    )  # fmt: skip
    return bitkernels.gated_rms_norm(y.flatten(2), z, norm_weight, group_size=case.norm_group_size), final_states


def gradients(outputs, tensors, grads):
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return dict(
        zip(
            [name for name, t in zip(NAMES, tensors, strict=True) if t is not None and t.requires_grad],
            torch.autograd.grad(outputs, leaves, grads),
            strict=True,
        )
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case, device):
    tensors = inputs(case, device, torch.float32, requires_grad=True)
    leaves = wide(*tensors)
    outputs = run(case, tensors)
    outputs_ref = reference.mamba2_mixer(*leaves, case.G, norm_group_size=case.norm_group_size)
    for name, out, ref in zip(("y", "final_states"), outputs, outputs_ref, strict=True):
        assert_close(name, out, ref)
    grads = [torch.randn_like(out) for out in outputs]
    grads_ref = gradients(outputs_ref, leaves, [g.double().cpu() for g in grads])
    for name, grad in gradients(outputs, tensors, grads).items():
        assert_close(f"d{name}", grad, grads_ref[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_its_parts(case, dtype, device):
    tensors = inputs(case, device, dtype, requires_grad=True)
    outputs, parts = run(case, tensors), composed(case, tensors)
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == torch.float32
    for name, out, part in zip(("y", "final_states"), outputs, parts, strict=True):
        assert_close(name, out, part.double())
    grads = [torch.randn_like(out) for out in outputs]
    expected = gradients(parts, tensors, grads)
    for name, grad in gradients(outputs, tensors, grads).items():
        assert grad.dtype == expected[name].dtype
        # Other strides may compile to another order of the same sums.
        assert_close(f"d{name}", grad, expected[name].double(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 70, 4, 16, 16, G=2, initial=True),
        Case(1, 90, 4, 16, 20, W=3, initial=True, cu_seqlens=(0, 1, 33, 33, 90)),
        Case(1, 300, 24, 64, 128, initial=True),  # on Hopper GPUs their own kernel
    ],
    ids=str,
)
def test_up_to_the_norm(case, dtype, device):
    tensors = inputs(case, device, dtype)
    y_ref, final_ref = run(case, tensors)
    before_norm, norm_weight = tensors[:6], tensors[6]
    y, final = gated_mixer(*before_norm, *tensors[7:9], tensors[10], case.G)
    assert_close("final_states", final, final_ref)
    normed = torch.nn.functional.rms_norm(y.float(), norm_weight.shape, norm_weight, 1e-5)
    assert_close("y", normed, y_ref, TOLERANCE[dtype])


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_through_one_output(which, device):
    """A loss on y alone, or on the final states alone."""
    case = CASES[1]
    tensors = inputs(case, device, torch.float32, requires_grad=True)
    leaves = wide(*tensors)
    run(case, tensors)[which].sum().backward()
    reference.mamba2_mixer(*leaves, case.G, norm_group_size=case.norm_group_size)[which].sum().backward()
    assert_close("dzxbcdt", tensors[0].grad, leaves[0].grad)


def test_gradcheck():
    case = Case(1, 5, 2, 2, 3, W=3, D="HP", initial=True, cu_seqlens=(0, 2, 5))
    *leaves, seq_idx, cu_seqlens = inputs(case, "cpu", torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *leaves: run(case, [*leaves, seq_idx, cu_seqlens]), leaves)


def test_keeps_its_arguments_alone(device):
    """Of what autograd saves nothing is new."""
    case = CASES[1]
    tensors = inputs(case, device, torch.float32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        run(case, tensors)
    assert set(saved) <= {t.data_ptr() for t in tensors if t is not None}


def test_noncontiguous(device):
    case = CASES[2]
    tensors = inputs(case, device, torch.float32)
    views = [None if t is None else noncontiguous(t) for t in tensors]
    for out, expected in zip(run(case, views), run(case, tensors), strict=True):
        assert_close("out", out, expected.double())


def test_opcheck(device):
    for case in (Case(2, 5, 2, 4, 3, D="HP", initial=True, seq_idx=True), Case(1, 5, 2, 4, 3, cu_seqlens=(0, 2, 5))):
        args = (*inputs(case, device, torch.float32), case.G)
        opcheck(torch.ops.bitkernels.mamba2_mixer.default, args)
        y, final_states = torch.ops.bitkernels.mamba2_mixer(*args)
        for dfinal_states in (final_states, None):
            opcheck(torch.ops.bitkernels.mamba2_mixer_backward.default, (y, dfinal_states, *args), grad=False)


def test_compile_and_cuda_graph(device):
    case = CASES[1]
    tensors = inputs(case, device, torch.float32, requires_grad=True)
    leaves = [t for t in tensors if t is not None]

    def loss(*tensors):
        return run(case, tensors)[0].square().sum()

    check_compiled_gradients(loss, tensors, leaves)
    plain = [None if t is None else t.detach() for t in tensors]
    check_compile(lambda *tensors: run(case, tensors), plain)
    if device == "cuda":
        check_cuda_graph(lambda *tensors: run(case, tensors), plain)


def test_compile_with_dynamic_time(device):
    function = torch.compile(lambda *t: run(CASES[0], t)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (33, 50):
        case = Case(1, T, 2, 16, 16)
        tensors = inputs(case, device, torch.float32)
        assert torch.equal(function(*tensors), run(case, tensors)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zxbcdt": torch.ones(2, 5, 50)}, r"mamba2_mixer: zxbcdt must have 40 features, got \[2, 5, 50\]"),
        ({"zxbcdt": torch.ones(5, 40)}, r"mamba2_mixer: zxbcdt must be \[B, T, .*got \[5, 40\]"),
        ({"zxbcdt": torch.ones(2, 5, 40, dtype=torch.int32)}, r"causal_conv1d: x must be float32.*Int"),
        ({"conv_weight": torch.ones(16, 4)}, r"mamba2_mixer: conv_weight must have 16 \+ 2 G N .*got \[16, 4\]"),
        ({"conv_weight": torch.ones(22)}, r"mamba2_mixer: conv_weight must be .*got \[22\]"),
        ({"A": torch.ones(3)}, r"mamba2_mixer: norm_weight must have a multiple of 3 heads, got \[16\]"),
        ({"A": torch.ones(2, 1)}, r"mamba2_mixer: A must be \[H\], got \[2, 1\]"),
        ({"norm_weight": torch.ones(16, 1)}, r"mamba2_mixer: norm_weight must be \[H P\], got \[16, 1\]"),
        ({"dt_bias": torch.ones(3)}, r"ssd_scan: dt_bias .*got \[3\]"),
        ({"ngroups": 4}, r"mamba2_mixer: conv_weight must have 16 \+ 2 G N channels for G = 4, got \[22, 4\]"),
    ],
)
def test_bad_input(change, words, device):
    good = dict(zip(NAMES, inputs(Case(2, 5, 2, 8, 3), device, torch.float32), strict=True))
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=words):
        bitkernels.mamba2_mixer(**{**good, **change})
