import math
from dataclasses import dataclass
from itertools import pairwise

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
    rms_error,
    wide,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import bitkernels
from bitkernels import reference

CUDA_LIBRARY = bitkernels.build_info()["packed matmuls on CUDA"] == "CUDA C++"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens")


@dataclass
class Case:
    batch: int
    T: int
    H: int
    P: int
    N: int
    G: int = 1
    D: str = ""  # "H", "HP"
    z: bool = False
    dt_bias: bool = True
    initial: bool = False
    seq_idx: bool = False
    cu_seqlens: tuple[int, ...] = ()
    softplus: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)

    def __str__(self):
        name = f"B{self.batch}-T{self.T}-H{self.H}-P{self.P}-N{self.N}-G{self.G}"
        options = ("z", "initial", "seq_idx", "cu_seqlens")
        return "-".join([name, *(f"D{self.D}" for _ in self.D[:1]), *(o for o in options if getattr(self, o))])


CASES = [
    Case(1, 1, 1, 1, 1, dt_bias=False),
    Case(1, 1, 2, 64, 16, D="H", z=True, initial=True),
    Case(2, 31, 4, 16, 16, G=2, D="H"),
    Case(1, 32, 2, 32, 32, G=2, D="HP", z=True),
    Case(1, 33, 3, 33, 17, D="HP", initial=True),
    Case(2, 70, 4, 64, 64, G=4, D="H", z=True, dt_limit=(0.002, 0.08)),
    Case(1, 130, 2, 64, 128, D="H"),
    Case(3, 65, 2, 8, 5, initial=True, softplus=False, dt_limit=(0.001, 0.5)),
    Case(2, 100, 4, 16, 16, G=2, D="H", z=True, initial=True, seq_idx=True),
    Case(1, 129, 2, 32, 24, D="HP", seq_idx=True),
    Case(1, 100, 4, 16, 20, G=2, D="H", z=True, initial=True, cu_seqlens=(0, 1, 33, 33, 97, 100)),
    Case(1, 64, 2, 32, 16, initial=True, cu_seqlens=(0, 30, 64, 64), seq_idx=True),
]


def inputs(case, device, dtype, requires_grad=False):
    """x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens; dt and A as a trained model has them."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    batch, T, H, P, N, G = case.batch, case.T, case.H, case.P, case.N, case.G
    x = torch.randn(batch, T, H, P).to(dtype)
    B, C = (torch.randn(batch, T, G, N).to(dtype) for _ in range(2))
    # Step sizes of 1e-3 to 0.1, and one in twenty up to 10.
    step = 10 ** (torch.rand(batch, T, H) * 2 - 3)
    step = torch.where(torch.rand(batch, T, H) < 0.05, 10 * torch.rand(batch, T, H), step)
    dt_bias = torch.randn(H).to(acc) if case.dt_bias else None
    raw = step.double().expm1().log() if case.softplus else step
    dt = (raw if dt_bias is None else raw - dt_bias).to(acc)
    A = (-1 - 15 * torch.rand(H)).to(acc)
    D = torch.randn(*((H, P) if case.D == "HP" else (H,))).to(acc) if case.D else None
    z = torch.randn(batch, T, H, P).to(dtype) if case.z else None
    sequences = len(case.cu_seqlens) - 1 if case.cu_seqlens else batch
    initial = torch.randn(sequences, H, P, N).to(acc) if case.initial else None
    seq_idx = torch.randint(0, 4, (batch, T)).sort(1).values.int() if case.seq_idx else None
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32) if case.cu_seqlens else None
    tensors = [x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, cu_seqlens]
    tensors = [None if t is None else t.to(device) for t in tensors]
    for t in tensors:
        if t is not None and t.is_floating_point():
            t.requires_grad_(requires_grad)
    return tensors


def run(case, tensors):
    named = dict(zip(NAMES, tensors, strict=True))
    return bitkernels.ssd_scan(**named, dt_softplus=case.softplus, dt_limit=case.dt_limit, return_final_states=True)


def run_reference(case, tensors):
    return reference.ssd_scan(*wide(*tensors), case.softplus, case.dt_limit)


def op_arguments(case, tensors):
    low, high = case.dt_limit
    return (*tensors, case.softplus, low, None if high == math.inf else high, 64)


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case, dtype, device):
    tensors = inputs(case, device, dtype)
    y, final_states = run(case, tensors)
    y_ref, final_ref = run_reference(case, tensors)
    assert y.dtype == dtype
    assert final_states.dtype == torch.float32
    assert_close("y", y, y_ref)
    assert_close("final_states", final_states, final_ref, TOLERANCE[dtype])


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, dtype, device):
    tensors = inputs(case, device, dtype, requires_grad=True)
    leaves = wide(*tensors)
    outputs = run(case, tensors)
    outputs_ref = reference.ssd_scan(*leaves, case.softplus, case.dt_limit)
    grads = [torch.randn_like(out) for out in outputs]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(outputs_ref, [g.double().cpu() for g in grads])
    spread = sensitivity(case, tensors, grads, dtype)
    for name, t, leaf in zip(NAMES, tensors, leaves, strict=True):
        if t is not None and t.requires_grad:
            assert t.grad.dtype == t.dtype
            assert_close(f"d{name}", t.grad, leaf.grad, TOLERANCE[dtype] + 2 * spread.get(name, 0.0))


def sensitivity(case, tensors, grads, dtype):
    """How much the true gradients of A and dt_bias change with the last bit of the activations.

    They are sums over every token that may cancel, and products in 16 bits round their operands as much.
    """
    if dtype == torch.float32:
        return {}

    def gradients(nudge):
        leaves = wide(*tensors)
        nudged = list(leaves)
        for i in (0, 3, 4):
            nudged[i] = leaves[i] * (1 + nudge * torch.finfo(dtype).eps * (torch.rand_like(leaves[i]) - 0.5))
        outputs = reference.ssd_scan(*nudged, case.softplus, case.dt_limit)
        torch.autograd.backward(outputs, [g.double().cpu() for g in grads])
        return {"A": leaves[2].grad, "dt_bias": None if leaves[7] is None else leaves[7].grad}

    exact, nudged = gradients(0), gradients(1)
    return {name: rms_error(nudged[name], g) for name, g in exact.items() if g is not None}


@pytest.mark.parametrize("case", [CASES[5], CASES[8]], ids=str)
def test_gradient_through_one_output(case, device):
    """A loss on y alone, or on the final states alone."""
    for which in (0, 1):
        tensors = inputs(case, device, torch.float32, requires_grad=True)
        leaves = wide(*tensors)
        out = run(case, tensors)[which]
        grad = torch.randn_like(out)
        out.backward(grad)
        reference.ssd_scan(*leaves, case.softplus, case.dt_limit)[which].backward(grad.double().cpu())
        for name, t, leaf in zip(NAMES, tensors, leaves, strict=True):
            if t is not None and t.requires_grad and leaf.grad is not None:
                assert_close(f"d{name}", t.grad, leaf.grad)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 3, 2, 2, 3, G=2, D="HP", z=True, initial=True),
        Case(1, 34, 1, 1, 2, D="H", initial=True),
        Case(1, 5, 2, 2, 2, D="H", z=True, initial=True, cu_seqlens=(0, 2, 2, 5)),
        Case(2, 5, 1, 2, 2, initial=True, seq_idx=True, softplus=False),
    ],
    ids=str,
)
def test_gradcheck(case):
    tensors = inputs(case, "cpu", torch.float64, requires_grad=True)
    tensors[1] = tensors[1].detach().clamp(max=0.5).requires_grad_()
    given = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]

    def function(*leaves):
        filled = list(tensors)
        for i, leaf in zip(given, leaves, strict=True):
            filled[i] = leaf
        return run(case, filled)

    assert torch.autograd.gradcheck(function, [tensors[i] for i in given])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noncontiguous(dtype, device):
    """x, B and C as slices of one tensor, as the convolution leaves them; the others at every other position."""
    case = Case(2, 45, 4, 16, 16, G=2, D="H", z=True, initial=True, seq_idx=True)
    tensors = inputs(case, device, dtype)
    expected = run(case, tensors)
    x, B, C = tensors[0], tensors[3], tensors[4]
    joined = torch.cat([t.flatten(2) for t in (x, B, C)], -1)
    parts = joined.split([64, 32, 32], -1)
    views = [None if t is None else noncontiguous(t) for t in tensors]
    views[0], views[3], views[4] = parts[0].unflatten(-1, (4, 16)), *(p.unflatten(-1, (2, 16)) for p in parts[1:])
    views[6] = tensors[6].transpose(1, 2).contiguous().transpose(1, 2)
    for out, out_expected in zip(run(case, views), expected, strict=True):
        # Other strides may compile to another order of the same sums.
        assert_close("out", out, out_expected.double())


# Hopper GPUs have kernels of their own for these, with D of one value a head for both directions of time.
MANY_HEADS = [
    Case(1, 64, 40, 64, 128),
    Case(1, 1, 40, 64, 64, D="H", dt_bias=False),
    Case(2, 150, 20, 64, 128, G=2, D="H", initial=True),
    Case(3, 65, 16, 64, 64, G=4, D="H", initial=True, softplus=False, dt_limit=(0.001, 0.5)),
    Case(2, 150, 20, 64, 128, G=2, D="H", z=True, initial=True),
]


def joined_inputs(case, device, dtype):
    """x, B and C as the convolution leaves them."""
    tensors = inputs(case, device, dtype)
    widths = [case.H * case.P, case.G * case.N, case.G * case.N]
    joined = torch.cat([t.flatten(2) for t in (tensors[0], tensors[3], tensors[4])], -1)
    x, B, C = joined.split(widths, -1)
    tensors[0], tensors[3], tensors[4] = (
        x.unflatten(-1, (case.H, -1)), B.unflatten(-1, (case.G, -1)), C.unflatten(-1, (case.G, -1)),
    )  # fmt: skip
    return tensors


def division(tensors):
    """How Hopper's kernel would divide it; no parts: it does not take it."""
    return torch.ops.bitkernels.ssd_scan_division(*(tensors[i] for i in (0, 3, 4, 6, 8, 9, 10)))


def has_hopper_kernels(device):
    return device == "cuda" and torch.cuda.get_device_capability() == (9, 0) and CUDA_LIBRARY


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*MANY_HEADS, Case(2, 150, 20, 64, 128, G=2, D="HP", z=True, initial=True)], ids=str)
def test_many_heads(case, dtype, device):
    tensors = joined_inputs(case, device, dtype)
    if has_hopper_kernels(device):
        assert division(tensors)[0] > 0
    outputs = run(case, tensors)
    for name, out, ref in zip(("y", "final_states"), outputs, run_reference(case, tensors), strict=True):
        assert_close(name, out, ref, TOLERANCE[dtype])
    assert all(torch.equal(a, b) for a, b in zip(outputs, run(case, tensors), strict=True))


@pytest.mark.gpu
@pytest.mark.memcheck
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 65, 24, 64, 128, D="H"),
        Case(1, 256, 40, 64, 64, G=2, D="HP", z=True, initial=True),
        Case(1, 450, 48, 64, 128, D="H", initial=True),
        Case(2, 330, 20, 64, 128, G=4, z=True, softplus=False, dt_limit=(0.001, 0.5)),
    ],
    ids=str,
)
def test_shared_sequences(case):
    """Thread blocks that share a sequence make the same bits as one alone, wherever their parts begin."""
    if not (torch.cuda.is_available() and has_hopper_kernels("cuda")):
        pytest.skip("no Hopper GPU is visible")
    tensors = joined_inputs(case, "cuda", torch.bfloat16)
    given = *tensors[:9], case.softplus, case.dt_limit[0], None if case.dt_limit[1] == math.inf else case.dt_limit[1]
    parts, cost, _ = division((*tensors[:6], None, *tensors[7:]))
    assert parts > 1

    def divided(*by):
        return torch.ops.bitkernels.ssd_scan_hopper(*given, *by)

    alone = divided(1, 0.0)
    for name, out, ref in zip(("y", "final_states"), alone, run_reference(case, tensors), strict=True):
        assert_close(name, out, ref, TOLERANCE[torch.bfloat16])
    for share in range(2, parts + 1):
        for states_cost in (0.0, cost, 0.9):
            outputs = divided(share, states_cost)
            assert all(torch.equal(a, b) for a, b in zip(alone, outputs, strict=True))


@pytest.mark.gpu
@pytest.mark.memcheck
@pytest.mark.parametrize("gated", [False, True], ids=["", "z"])
@pytest.mark.parametrize("T", [65, 450])
def test_second_parts_in_turns(T, gated):
    """They make the same bits as a thread block alone."""
    if not (torch.cuda.is_available() and has_hopper_kernels("cuda")):
        pytest.skip("no Hopper GPU is visible")
    case = Case(1, T, 80, 64, 128, D="H", z=True, initial=True)
    x, dt, A, B, C, D, z, dt_bias, initial = joined_inputs(case, "cuda", torch.bfloat16)[:9]
    given = x, dt, A, B, C, D, z if gated else None, dt_bias, initial, True, 0.0, None
    alone = torch.ops.bitkernels.ssd_scan_hopper(*given, 1, 0.0, 1)
    for states_cost in (0.0, 0.4, 0.9):
        assert all(map(torch.equal, torch.ops.bitkernels.ssd_scan_hopper(*given, 2, states_cost, 2), alone))
    with pytest.raises(ValueError, match="turns"):
        torch.ops.bitkernels.ssd_scan_hopper(*given, 1, 0.4, 2)


@pytest.mark.gpu
def test_too_many_parts():
    if not (torch.cuda.is_available() and has_hopper_kernels("cuda")):
        pytest.skip("no Hopper GPU is visible")
    x, dt, A, B, C = inputs(Case(1, 65, 24, 64, 128), "cuda", torch.bfloat16)[:5]
    for parts in (0, 3, 5):
        with pytest.raises(ValueError, match="parts"):
            torch.ops.bitkernels.ssd_scan_hopper(x, dt, A, B, C, None, None, None, None, True, 0.0, None, parts, 0.4)


@pytest.mark.gpu
@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MANY_HEADS, ids=str)
def test_gradients_of_many_heads(case, dtype, monkeypatch):
    """With the states of all sequences held at once, of one after the other, and of a block of each."""
    if not (torch.cuda.is_available() and has_hopper_kernels("cuda")):
        pytest.skip("no Hopper GPU is visible")
    from bitkernels.triton import launch, ssd_hopper

    tensors = [None if t is None else t.requires_grad_() for t in joined_inputs(case, "cuda", dtype)]
    leaves = wide(*tensors)
    outputs_ref = reference.ssd_scan(*leaves, case.softplus, case.dt_limit)
    grads = [torch.randn_like(out) for out in run(case, tensors)]
    torch.autograd.backward(outputs_ref, [g.double().cpu() for g in grads])
    spread = sensitivity(case, tensors, grads, dtype)
    x, dt, _, B, C, D, z, _, initial, *_ = tensors
    assert ssd_hopper.backward_on_hopper(*grads, x, dt, B, C, D, z, initial, None, None)
    unlimited = ssd_hopper.STATE_BYTES, ssd_hopper.PART_BYTES
    for state_bytes, part_bytes in (unlimited, (1, unlimited[1]), (1, 1)):
        monkeypatch.setattr(ssd_hopper, "STATE_BYTES", state_bytes)
        monkeypatch.setattr(ssd_hopper, "PART_BYTES", part_bytes)
        monkeypatch.setattr(launch, "PLANS", {})
        results = torch.ops.bitkernels.ssd_scan_backward(*grads, *op_arguments(case, tensors))
        again = torch.ops.bitkernels.ssd_scan_backward(*grads, *op_arguments(case, tensors))
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
        for name, leaf, result in zip(NAMES, leaves, results, strict=False):
            if leaf is not None:
                assert_close(f"d{name}", result, leaf.grad, TOLERANCE[dtype] + 2 * spread.get(name, 0.0))


@pytest.mark.gpu
def test_gradient_of_A_of_many_heads():
    """It adds up what crosses every block of 64 tokens: rounding that to 16 bits leaves errors of 4e-4 to 2e-3."""
    if not (torch.cuda.is_available() and has_hopper_kernels("cuda")):
        pytest.skip("no Hopper GPU is visible")
    case = Case(1, 256, 40, 64, 128, initial=True)
    tensors = [None if t is None else t.requires_grad_() for t in joined_inputs(case, "cuda", torch.bfloat16)]
    leaves = wide(*tensors)
    grads = [torch.randn_like(out) for out in run(case, tensors)]
    torch.autograd.backward(reference.ssd_scan(*leaves, case.softplus), [g.double().cpu() for g in grads])
    dA = torch.ops.bitkernels.ssd_scan_backward(*grads, *op_arguments(case, tensors))[2]
    assert_close("dA", dA, leaves[2].grad, 2e-4)


def test_expanded_gradient(device):
    """The gradient of a sum has stride 0."""
    case = CASES[3]
    tensors = inputs(case, device, torch.float32, requires_grad=True)
    leaves = wide(*tensors)
    run(case, tensors)[0].sum().backward()
    reference.ssd_scan(*leaves, case.softplus, case.dt_limit)[0].sum().backward()
    assert_close("dx", tensors[0].grad, leaves[0].grad)


def test_expanded_tokens(device):
    """The gradient of a sum over tokens has stride 0 along them and dense rows. B is the same for all tokens, too."""
    case = Case(2, 70, 20, 64, 64, D="H")
    tensors = inputs(case, device, torch.bfloat16)
    tensors[3] = tensors[3][:, :1].expand(-1, case.T, -1, -1)
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    dy = torch.randn(case.batch, 1, case.H, case.P, device=device).bfloat16().expand(-1, case.T, -1, -1)
    leaves = wide(*tensors)
    y, y_ref = run(case, tensors)[0], run_reference(case, tensors)[0]
    assert_close("y", y, y_ref, TOLERANCE[torch.bfloat16])
    y.backward(dy)
    reference.ssd_scan(*leaves, case.softplus, case.dt_limit)[0].backward(dy.double().cpu())
    for i in (0, 4):
        assert_close(f"d{NAMES[i]}", tensors[i].grad, leaves[i].grad, TOLERANCE[torch.bfloat16])


def test_expanded_axes_are_not_boxed():
    """The copy engine's maps are not specified for a stride of zero."""
    from bitkernels.triton.ssd_hopper import boxed

    rows = torch.zeros(2, 1, 3, 64, dtype=torch.bfloat16)
    assert boxed(rows)
    assert not boxed(rows.expand(-1, 5, -1, -1))
    assert not boxed(rows[:1].expand(2, -1, -1, -1))


@pytest.mark.parametrize("case", [CASES[5], CASES[10], Case(1, 300, 6, 32, 32, G=2, D="HP")], ids=str)
def test_same_bits_every_run(case, device):
    tensors = inputs(case, device, torch.bfloat16)
    first = run(case, tensors)
    args = (first[0], None, *op_arguments(case, tensors))
    grads = torch.ops.bitkernels.ssd_scan_backward(*args)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again, grads_again = run(case, tensors), torch.ops.bitkernels.ssd_scan_backward(*args)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip((*first, *grads), (*again, *grads_again), strict=True))


def test_extreme_steps(device):
    """Large steps, long decay and steps of zero give numbers, and the right ones."""
    case = Case(1, 80, 2, 16, 16, D="H", initial=True, softplus=False)
    tensors = inputs(case, device, torch.float32)
    tensors[7] = None
    dt = torch.zeros(1, 80, 2, device=device)
    dt[:, 10:20], dt[:, 40], dt[:, 60:] = 1000.0, 1e-6, 3.0
    tensors[1] = dt
    tensors = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    leaves = wide(*tensors)
    outputs, outputs_ref = run(case, tensors), reference.ssd_scan(*leaves, False, case.dt_limit)
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    torch.autograd.backward(outputs_ref, [torch.ones_like(o) for o in outputs_ref])
    assert_close("y", outputs[0], outputs_ref[0])
    assert_close("final_states", outputs[1], outputs_ref[1])
    for name, t, leaf in zip(NAMES, tensors, leaves, strict=True):
        if t is not None and t.requires_grad:
            assert_close(f"d{name}", t.grad, leaf.grad)


def test_negative_steps_are_zero(device):
    """Without a softplus the limits alone keep step sizes from being negative."""
    case = Case(1, 40, 2, 16, 16, D="H", softplus=False)
    tensors = inputs(case, device, torch.float32)
    tensors[1] = torch.randn(1, 40, 2, device=device)
    tensors = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    leaves = wide(*tensors)
    y, _ = run(case, tensors)
    y_ref, _ = reference.ssd_scan(*leaves, False, case.dt_limit)
    grad = torch.randn_like(y)
    y.backward(grad)
    y_ref.backward(grad.double().cpu())
    assert_close("y", y, y_ref)
    assert_close("ddt", tensors[1].grad, leaves[1].grad)


@pytest.mark.parametrize("seq_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_match_separate_ones(seq_dtype, device):
    case = Case(1, 90, 4, 16, 16, G=2, D="H", z=True)
    tensors = inputs(case, device, torch.float32)
    ends = [0, 40, 41, 90]
    packed = [*tensors[:10], torch.tensor(ends, dtype=seq_dtype, device=device)]
    y, final_states = run(case, packed)
    for s, (begin, end) in enumerate(pairwise(ends)):
        part = [t[:, begin:end] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(tensors)]
        y_part, final_part = run(case, part)
        assert_close("y", y[:, begin:end], y_part.double())
        assert_close("final_states", final_states[s : s + 1], final_part.double())
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(ends).diff()).to(device, seq_dtype)[None]
    y_ids, final_ids = run(case, [*tensors[:9], ids, None])
    assert_close("y", y_ids, y.double())
    assert_close("final_states", final_ids, final_states[-1:].double())


@pytest.mark.parametrize("initial", [False, True])
def test_no_tokens(initial, device):
    case = Case(2, 0, 2, 16, 16, D="H", initial=initial)
    tensors = inputs(case, device, torch.float32, requires_grad=True)
    y, final_states = run(case, tensors)
    assert y.shape == (2, 0, 2, 16)
    assert torch.equal(final_states, tensors[8] if initial else torch.zeros_like(final_states))
    final_states.sum().backward()
    assert torch.equal(tensors[2].grad, torch.zeros_like(tensors[2]))
    if initial:
        assert torch.equal(tensors[8].grad, torch.ones_like(tensors[8]))


def test_dt_in_the_dtype_of_x(device):
    case = CASES[2]
    tensors = inputs(case, device, torch.bfloat16, requires_grad=True)
    tensors[1] = tensors[1].detach().bfloat16().requires_grad_()
    y, _ = run(case, tensors)
    assert_close("y", y, run_reference(case, tensors)[0])
    y.sum().backward()
    assert tensors[1].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
def test_state_dtype(state_dtype, device):
    """Of the initial states as of the final ones; what is given back is rounded once, at the end."""
    case = CASES[8]
    tensors = inputs(case, device, torch.float32)
    tensors[8] = tensors[8].to(state_dtype).requires_grad_()
    options = {"dt_softplus": True, "return_final_states": True, "state_dtype": state_dtype}
    y, final_states = bitkernels.ssd_scan(**dict(zip(NAMES, tensors, strict=True)), **options)
    y_wide, final_wide = run(case, [*tensors[:8], tensors[8].detach().float(), *tensors[9:]])
    assert y.dtype == torch.float32
    assert final_states.dtype == state_dtype
    assert_close("y", y, y_wide.double())
    assert_close("final_states", final_states, final_wide.double())
    final_states.sum().backward()
    assert tensors[8].grad.dtype == state_dtype


def test_bad_state_dtype():
    tensors = inputs(CASES[1], "cpu", torch.float32)
    with pytest.raises(ValueError, match="ssd_scan: state_dtype must be a floating dtype, got torch.int32"):
        bitkernels.ssd_scan(*tensors[:5], state_dtype=torch.int32)


def test_returns_y_alone_by_default(device):
    case = CASES[2]
    x, dt, A, B, C, D, _, dt_bias = inputs(case, device, torch.float32)[:8]
    y = bitkernels.ssd_scan(x, dt, A, B, C, 128, D, dt_bias=dt_bias, dt_softplus=True)
    assert torch.equal(y, run(case, [x, dt, A, B, C, D, None, dt_bias, None, None, None])[0])


@pytest.mark.parametrize("case", [Case(2, 7, 2, 4, 3, D="HP", z=True, initial=True), CASES[0]], ids=str)
def test_opcheck(case, device):
    tensors = inputs(case, device, torch.float32)
    args = op_arguments(case, tensors)
    opcheck(torch.ops.bitkernels.ssd_scan.default, args)
    y, final_states = torch.ops.bitkernels.ssd_scan(*args)
    for dfinal_states in (final_states, None):
        opcheck(torch.ops.bitkernels.ssd_scan_backward.default, (y, dfinal_states, *args), grad=False)


def test_opcheck_packed(device):
    case = Case(1, 7, 2, 4, 3, D="H", cu_seqlens=(0, 3, 7), seq_idx=True)
    opcheck(torch.ops.bitkernels.ssd_scan.default, op_arguments(case, inputs(case, device, torch.float32)))


def test_compile_and_cuda_graph(device):
    case = Case(2, 40, 2, 16, 16, D="H", z=True)
    tensors = inputs(case, device, torch.float32, requires_grad=True)
    leaves = [t for t in tensors if t is not None]

    def loss(*tensors):
        return run(case, tensors)[0].square().sum()

    check_compiled_gradients(loss, tensors, leaves)
    plain = [None if t is None else t.detach() for t in tensors]
    check_compile(lambda *tensors: run(case, tensors), plain)
    if device == "cuda":
        check_cuda_graph(lambda *tensors: run(case, tensors), plain)


def test_without_gradients(device):
    """Where none can be asked for, their code is skipped: eagerly, compiled, under transforms."""
    case = Case(2, 40, 2, 16, 16, D="H", z=True)
    tensors = inputs(case, device, torch.float32, requires_grad=True)
    outputs = run(case, tensors)
    compiled = torch.compile(lambda *tensors: run(case, tensors), fullgraph=True, backend="aot_eager")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for function in (lambda *tensors: run(case, tensors), compiled):
                results = function(*tensors)
                assert not any(result.requires_grad for result in results)
                assert all(torch.equal(a, b) for a, b in zip(outputs, results, strict=True))

    def loss(x):
        with torch.no_grad():
            constant = run(case, [x, *tensors[1:]])[0]
        return (x * constant).sum()

    assert_close("gradient", torch.func.grad(loss)(tensors[0].detach()), outputs[0].double())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_traced(mode):
    """One call of the operator, whoever traces, with gradients and without."""
    case = Case(1, 20, 2, 16, 16)
    tensors = inputs(case, "cpu", torch.float32)
    tensors[0].requires_grad_(mode is torch.enable_grad)

    class Scan(torch.nn.Module):
        def forward(self, x):
            return run(case, [x, *tensors[1:]])[0]

    with mode():
        expected = Scan()(tensors[0])
        for graph in (make_fx(Scan())(tensors[0]), torch.export.export(Scan(), (tensors[0],)).module()):
            calls = [node for node in graph.graph.nodes if node.target is torch.ops.bitkernels.ssd_scan.default]
            assert len(calls) == 1
            assert torch.equal(graph(tensors[0]), expected)
        with FakeTensorMode() as fake:
            y = run(case, [None if t is None else fake.from_tensor(t) for t in tensors])[0]
            assert y.shape == expected.shape
            assert y.requires_grad == expected.requires_grad


def test_recomputed_gradients(device):
    case = Case(1, 20, 2, 16, 16, D="H")
    tensors = inputs(case, device, torch.float32, requires_grad=True)
    x, D = tensors[0], tensors[5]
    expected = torch.autograd.grad(run(case, tensors)[0].square().sum(), (x, D))
    y = checkpoint(lambda *tensors: run(case, tensors)[0], *tensors, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(y.square().sum(), (x, D)), expected))


def test_compile_with_dynamic_time(device):
    case = Case(1, 33, 2, 16, 16)
    function = torch.compile(lambda *tensors: run(case, tensors), fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (33, 50):
        tensors = inputs(Case(1, T, 2, 16, 16), device, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(function(*tensors), run(case, tensors), strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(2, 9, 64)}, r"ssd_scan: x must be \[B, T, H, P\], got \[2, 9, 64\]"),
        ({"x": torch.ones(2, 9, 4, 16, dtype=torch.int32)}, "ssd_scan: x must be float32.*Int"),
        ({"dt": torch.randn(2, 9, 3)}, r"ssd_scan: dt .*got \[2, 9, 3\]"),
        ({"dt": torch.ones(2, 9, 4, dtype=torch.int64)}, "ssd_scan: dt .*Long"),
        ({"A": torch.ones(3)}, r"ssd_scan: A .*got \[3\]"),
        ({"B": torch.randn(2, 9, 3, 8)}, r"ssd_scan: B .*divides 4 heads, got \[2, 9, 3, 8\]"),
        ({"B": torch.randn(2, 8, 2, 8)}, r"ssd_scan: B .*got \[2, 8, 2, 8\]"),
        ({"B": torch.randn(2, 9, 2, 8).half()}, "ssd_scan: B must be Float, got Half"),
        ({"C": torch.randn(2, 9, 2, 7)}, r"ssd_scan: C .*got \[2, 9, 2, 7\]"),
        ({"D": torch.ones(4, 15)}, r"ssd_scan: D .*got \[4, 15\]"),
        ({"z": torch.randn(2, 9, 4, 15)}, r"ssd_scan: z .*got \[2, 9, 4, 15\]"),
        ({"dt_bias": torch.ones(5)}, r"ssd_scan: dt_bias .*got \[5\]"),
        ({"initial_states": torch.ones(1, 4, 16, 8)}, r"ssd_scan: initial_states .*got \[1, 4, 16, 8\]"),
        ({"seq_idx": torch.ones(2, 8, dtype=torch.int32)}, r"ssd_scan: seq_idx .*got \[2, 8\]"),
        ({"seq_idx": torch.ones(2, 9)}, "ssd_scan: seq_idx must be int32 or int64, got Float"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "ssd_scan: x must have a batch of one with cu_seqlens"),
        ({"chunk_size": 0}, "ssd_scan: chunk_size must be positive, got 0"),
        ({"dt_limit": (1.0, 0.5)}, r"ssd_scan: dt_limit .*got \(1, 0.5\)"),
    ],
)
def test_bad_input(change, words, device):
    case = Case(2, 9, 4, 16, 8, G=2, D="H", z=True, initial=True)
    good = dict(zip(NAMES, inputs(case, device, torch.float32), strict=True))
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=words):
        bitkernels.ssd_scan(**{**good, **change})


@pytest.mark.parametrize("ends", [[0, 4], [1, 9], [0, 5, 3, 9]])
def test_bad_cu_seqlens(ends):
    x, dt, A, B, C = inputs(Case(1, 9, 2, 16, 8), "cpu", torch.float32)[:5]
    with pytest.raises(ValueError, match="ssd_scan: cu_seqlens must"):
        bitkernels.ssd_scan(x, dt, A, B, C, cu_seqlens=torch.tensor(ends))


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "T"), [(1, 210_000), (5, 42_000)])
def test_addresses_beyond_32_bits(batch, T):
    """Tokens of a projection of more than 2^31 elements; strong decays make the end independent of the rest."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    H, P, N, tail = 80, 64, 128, 2048
    projected = torch.empty(batch, T, 2 * H * P + 2 * N + H, dtype=torch.bfloat16, device="cuda").normal_()
    assert projected.numel() > 2**31
    x, B, C = projected[..., H * P : -H].split([H * P, N, N], -1)
    x, B, C = x.unflatten(-1, (H, P)), B.unsqueeze(2), C.unsqueeze(2)
    dt, A = torch.ones(batch, T, H, device="cuda"), torch.full((H,), -1.0, device="cuda")
    dy = torch.zeros_like(x[:, -128:]).normal_()

    def last(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = bitkernels.ssd_scan(*leaves[:2], A, *leaves[2:])
        y[:, -128:].backward(dy)
        return [y.detach(), *(t.grad for t in leaves)]

    results = last(x, dt, B, C)
    expected = last(*(t[:, -tail:].contiguous() for t in (x, dt, B, C)))
    for name, out, ref in zip(("y", "dx", "ddt", "dB", "dC"), results, expected, strict=True):
        # Other divisions into chunks round other sums.
        assert_close(name, out[:, -128:], ref[:, -128:].double(), TOLERANCE[torch.bfloat16])
