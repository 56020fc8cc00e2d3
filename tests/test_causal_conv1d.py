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

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight", "bias", "initial_state", "seq_idx", "cu_seqlens")


@dataclass
class Case:
    batch: int
    T: int
    C: int
    W: int = 4
    bias: bool = True
    initial: bool = False
    seq_idx: bool = False
    cu_seqlens: tuple[int, ...] = ()
    activation: str | None = "silu"

    def __str__(self):
        options = "-".join(o for o in ("bias", "initial", "seq_idx", "cu_seqlens") if getattr(self, o))
        return f"B{self.batch}-T{self.T}-C{self.C}-W{self.W}-{options}-{self.activation}"


CASES = [
    Case(1, 1, 1, 2, bias=False),
    Case(2, 3, 33, 4, initial=True),
    Case(1, 31, 64, 3),
    Case(1, 32, 65, 4, activation=None),
    Case(2, 33, 31, 2, bias=False, initial=True, activation="swish"),
    Case(2, 100, 130, 4, initial=True, seq_idx=True),
    Case(1, 70, 16, 3, seq_idx=True, activation=None),
    Case(2, 40, 24, 1),
    Case(2, 45, 260, 2, initial=True),
    Case(2, 100, 132, 4, initial=True, seq_idx=True),
    Case(1, 100, 64, 4, initial=True, cu_seqlens=(0, 0, 2, 31, 64, 100, 100)),
    Case(1, 50, 20, 6, initial=True),
    Case(1, 100, 70, 4, cu_seqlens=(0, 1, 1, 3, 35, 99, 100)),
    Case(1, 100, 33, 4, initial=True, cu_seqlens=(0, 0, 2, 31, 64, 100, 100)),
    Case(1, 70, 12, 3, initial=True, seq_idx=True, cu_seqlens=(0, 30, 70), activation=None),
    Case(0, 5, 8),
    Case(2, 0, 8, initial=True),
]


def inputs(case, device, dtype, requires_grad=False):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    sequences = len(case.cu_seqlens) - 1 if case.cu_seqlens else case.batch
    tensors = [
        torch.randn(case.batch, case.T, case.C).to(dtype),
        torch.randn(case.C, case.W).to(acc),
        torch.randn(case.C).to(acc) if case.bias else None,
        torch.randn(sequences, case.W - 1, case.C).to(dtype) if case.initial else None,
        torch.randint(0, 9, (case.batch, case.T)).sort(1).values.int() if case.seq_idx else None,
        torch.tensor(case.cu_seqlens, dtype=torch.int32) if case.cu_seqlens else None,
    ]
    tensors = [None if t is None else t.to(device) for t in tensors]
    for t in tensors:
        if t is not None and t.is_floating_point():
            t.requires_grad_(requires_grad)
    return tensors


def run_reference(case, tensors):
    return reference.causal_conv1d(*tensors, "silu" if case.activation else None)


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case, dtype, device):
    tensors = inputs(case, device, dtype, requires_grad=True)
    leaves = wide(*tensors)
    y = bitkernels.causal_conv1d(*tensors, activation=case.activation)
    y_ref = run_reference(case, leaves)
    assert y.dtype == dtype
    assert_close("y", y, y_ref)
    grad = torch.randn_like(y)
    y.backward(grad)
    y_ref.backward(grad.double().cpu())
    for name, t, leaf in zip(NAMES, tensors, leaves, strict=True):
        if t is not None and t.requires_grad:
            assert t.grad.dtype == t.dtype
            expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            assert_close(f"d{name}", t.grad, expected, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_many_tokens():
    """They are divided into longer strips than few, and have the same bits."""
    x, weight, bias, initial = inputs(Case(2, 8192, 4096, initial=True), "cuda", torch.bfloat16)[:4]
    y = bitkernels.causal_conv1d(x, weight, bias, initial)
    assert torch.equal(y[:, :100], bitkernels.causal_conv1d(x[:, :100], weight, bias, initial))
    for begin in (3, 4100, 8150):
        part, before = x[:, begin : begin + 40], x[:, begin - 3 : begin]
        assert torch.equal(y[:, begin : begin + 40], bitkernels.causal_conv1d(part, weight, bias, before))


def test_weight_in_the_dtype_of_x(device):
    x, weight, bias = inputs(CASES[2], device, torch.bfloat16)[:3]
    weight, bias = weight.bfloat16().requires_grad_(), bias.bfloat16().requires_grad_()
    y = bitkernels.causal_conv1d(x, weight, bias)
    assert_close("y", y, reference.causal_conv1d(*wide(x, weight, bias)))
    y.sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "case",
    [CASES[1], Case(1, 40, 3, 4, initial=True, seq_idx=True), Case(1, 5, 2, initial=True, cu_seqlens=(0, 2, 2, 5))],
    ids=str,
)
def test_gradcheck(case):
    *leaves, seq_idx, cu_seqlens = inputs(case, "cpu", torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *leaves: bitkernels.causal_conv1d(*leaves, seq_idx, cu_seqlens), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slice_of_a_wider_tensor(dtype, device):
    x, weight, bias = inputs(CASES[5], device, dtype)[:3]
    expected = bitkernels.causal_conv1d(x, weight, bias)
    wider = torch.randn(2, 100, 300, device=device).to(dtype)
    wider[..., 50:180] = x
    assert torch.equal(bitkernels.causal_conv1d(wider[..., 50:180], weight, bias), expected)
    views = (noncontiguous(x), noncontiguous(weight), noncontiguous(bias))
    assert torch.equal(bitkernels.causal_conv1d(*views), expected)


def test_expanded_gradient(device):
    tensors = inputs(CASES[2], device, torch.float32, requires_grad=True)
    leaves = wide(*tensors)
    bitkernels.causal_conv1d(*tensors).sum().backward()
    reference.causal_conv1d(*leaves).sum().backward()
    assert_close("dx", tensors[0].grad, leaves[0].grad)


def test_same_bits_every_run(device):
    tensors = inputs(CASES[5], device, torch.bfloat16)
    y = bitkernels.causal_conv1d(*tensors)
    args = (y, *tensors, True)
    grads = torch.ops.bitkernels.causal_conv1d_backward(*args)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = torch.ops.bitkernels.causal_conv1d_backward(*args)
        assert torch.equal(bitkernels.causal_conv1d(*tensors), y)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_steps_equal_the_convolution(W, activation, dtype, device):
    x, weight, bias, initial = inputs(Case(2, 9, 37, W, initial=True), device, dtype)[:4]
    y = bitkernels.causal_conv1d(x, weight, bias, initial, activation=activation)
    state = initial.clone()
    steps = [bitkernels.causal_conv1d_step(state, x[:, t], weight, bias, activation) for t in range(9)]
    assert_close("y", torch.stack(steps, 1), y.double(), TOLERANCE[dtype])
    assert torch.equal(state, torch.cat([initial, x], 1)[:, 9:])


def test_step_value(device):
    x, weight, bias, initial = inputs(Case(3, 1, 40, 4, initial=True), device, torch.float32)[:4]
    state, state_ref = noncontiguous(initial), initial.clone()
    y = bitkernels.causal_conv1d_step(state, noncontiguous(x[:, 0]), weight, bias)
    assert_close("y", y, reference.causal_conv1d_step(state_ref, x[:, 0], weight, bias).double())
    assert torch.equal(state, state_ref)


def test_opcheck(device):
    args = inputs(Case(2, 5, 6, 4, initial=True, seq_idx=True), device, torch.float32)
    opcheck(torch.ops.bitkernels.causal_conv1d.default, (*args, True))
    opcheck(torch.ops.bitkernels.causal_conv1d_backward.default, (args[0], *args, True), grad=False)
    opcheck(
        torch.ops.bitkernels.causal_conv1d_backward.default, (args[0], *args[:2], None, None, None, None), grad=False
    )
    packed = (*inputs(Case(1, 7, 6, 4, initial=True, cu_seqlens=(0, 3, 7)), device, torch.float32), True)
    opcheck(torch.ops.bitkernels.causal_conv1d.default, packed)
    opcheck(torch.ops.bitkernels.causal_conv1d_backward.default, (packed[0], *packed), grad=False)
    opcheck(torch.ops.bitkernels.causal_conv1d_step.default, (args[3], args[0][:, 0], *args[1:3]), grad=False)


def test_compile_and_cuda_graph(device):
    args = inputs(Case(2, 5, 6, 4, initial=True), device, torch.float32, requires_grad=True)

    def function(*args):
        y = bitkernels.causal_conv1d(*args)
        state = args[3].clone()
        return y, bitkernels.causal_conv1d_step(state, args[0][:, 0], args[1], args[2]), state

    check_compile(function, [None if a is None else a.detach() for a in args])
    leaves = args[:4]

    def loss(*leaves):
        return bitkernels.causal_conv1d(*leaves).square().sum()

    check_compiled_gradients(loss, leaves, leaves)
    if device == "cuda":
        check_cuda_graph(bitkernels.causal_conv1d, [a.detach() for a in leaves])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(2, 6)}, r"causal_conv1d: x must be \[B, T, C\], got \[2, 6\]"),
        ({"x": torch.ones(2, 5, 6, dtype=torch.int64)}, "causal_conv1d: x must be float32.*Long"),
        ({"weight": torch.ones(7, 4)}, r"causal_conv1d: weight .*got \[7, 4\]"),
        ({"bias": torch.ones(7)}, r"causal_conv1d: bias .*got \[7\]"),
        ({"initial_state": torch.ones(2, 4, 6)}, r"causal_conv1d: initial_state .*got \[2, 4, 6\]"),
        ({"seq_idx": torch.ones(2, 4, dtype=torch.int32)}, r"causal_conv1d: seq_idx .*got \[2, 4\]"),
        ({"seq_idx": torch.ones(2, 5)}, "causal_conv1d: seq_idx must be int32 or int64, got Float"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "causal_conv1d: x must have a batch of one with cu_seqlens"),
        ({"cu_seqlens": torch.ones(2)}, "causal_conv1d: cu_seqlens must be int32 or int64, got Float"),
        ({"activation": "relu"}, "causal_conv1d: activation must be .*'relu'"),
    ],
)
def test_bad_input(change, words, device):
    good = dict(zip(NAMES, inputs(Case(2, 5, 6, 4, initial=True), device, torch.float32), strict=True))
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=words):
        bitkernels.causal_conv1d(**{**good, **change})


def test_bad_step_input(device):
    x, weight, bias, initial = inputs(Case(2, 1, 6, 4, initial=True), device, torch.float32)[:4]
    with pytest.raises(ValueError, match=r"causal_conv1d_step: conv_state .*got \[2, 2, 6\]"):
        bitkernels.causal_conv1d_step(initial[:, 1:], x[:, 0], weight, bias)
    with pytest.raises(ValueError, match=r"causal_conv1d_step: x must be \[B, C\]"):
        bitkernels.causal_conv1d_step(initial, x, weight, bias)


@pytest.mark.parametrize("ends", [[0, 4], [1, 9], [0, 5, 3, 9]])
def test_bad_cu_seqlens(ends):
    """On a GPU, where reading them would wait for it, they are taken as they are."""
    with pytest.raises(ValueError, match="causal_conv1d: cu_seqlens must"):
        bitkernels.causal_conv1d(torch.ones(1, 9, 2), torch.ones(2, 4), cu_seqlens=torch.tensor(ends))
