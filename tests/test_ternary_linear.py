from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TOLERANCE,
    assert_close,
    cancellation,
    check_compile,
    check_cuda_graph,
    noncontiguous,
    opcheck,
    rms_error,
    wide,
)

import bitkernels
from bitkernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    batch: tuple[int, ...]
    N: int
    K: int
    bias: bool = False

    def __str__(self):
        return f"{'x'.join(map(str, self.batch)) or 'vector'}-N{self.N}-K{self.K}{'-bias' if self.bias else ''}"


CASES = [
    Case((1,), 1, 1),
    Case((), 5, 33),
    Case((1,), 64, 15),
    Case((1,), 65, 16, bias=True),
    Case((1,), 127, 17),
    Case((1,), 256, 1024, bias=True),
    Case((2, 3), 70, 100, bias=True),
    Case((8,), 100, 257),
    Case((9,), 33, 513, bias=True),
    Case((1,), 300, 640, bias=True),
    Case((2,), 1000, 2048),
    Case((33,), 129, 768),
    Case((130,), 200, 320, bias=True),
    Case((257,), 72, 129),
    Case((0,), 5, 33),
    Case((3,), 0, 33),
    Case((3,), 5, 0, bias=True),
]


def inputs(case, device, dtype, requires_grad=False):
    """x, w_packed, scale, bias."""
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(*case.batch, case.K, device=device).to(dtype)
    w_packed = bitkernels.pack_ternary(torch.randint(-1, 2, (case.N, case.K), device=device, dtype=torch.int8))
    scale = torch.rand(1, device=device, dtype=wide_dtype) + 0.1
    bias = torch.randn(case.N, device=device, dtype=wide_dtype) if case.bias else None
    for t in (x, scale, bias):
        if t is not None:
            t.requires_grad_(requires_grad)
    return x, w_packed, scale, bias


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case, dtype, device):
    args = inputs(case, device, dtype)
    y = bitkernels.ternary_linear(*args)
    assert y.dtype == dtype
    assert_close("y", y, reference.ternary_linear(*wide(*args)))


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8_equals_integer_arithmetic_to_the_bit(case, dtype, device):
    args = inputs(case, device, dtype)
    y = bitkernels.ternary_linear(*args, act_bits=8)
    cpu = [a if a is None else a.cpu() for a in args]
    assert torch.equal(y.cpu(), reference.ternary_linear(*cpu, act_bits=8))


def test_int8_extremes(device):
    """Sums of the largest magnitude, every weight and activation at its limit."""
    K = 5000
    x = torch.ones(3, K, device=device)
    x[1] = -1
    w = torch.ones(4, K, device=device, dtype=torch.int8)
    w[1] = -1
    w[2] = 0
    y = bitkernels.ternary_linear(x, bitkernels.pack_ternary(w), torch.ones(1, device=device), act_bits=8)
    assert torch.equal(y, torch.tensor([[K, -K, 0, K], [-K, K, 0, -K], [K, -K, 0, K]], device=device).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 5, 8, 13, 16, 32, 64, 100, 300])
def test_as_accurate_as_the_dense_layer(M, dtype, device):
    x, w_packed, scale, _ = inputs(Case((M,), 640, 512), device, dtype)
    scale = scale.to(dtype).float()
    dense = reference.unpack_ternary(w_packed, 512) * scale
    ref = F.linear(*wide(x, dense))
    error = rms_error(bitkernels.ternary_linear(x, w_packed, scale), ref)
    assert error <= (1e-5 if dtype == torch.float32 else 1.1 * rms_error(F.linear(x, dense.to(dtype)), ref))


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("K", [1, 15, 16, 17, 200])
def test_one_hot_activations_return_the_matrix(K, act_bits, device):
    w = torch.randint(-1, 2, (37, K), device=device).float()
    scale = torch.tensor([0.25], device=device)
    x = torch.eye(K, device=device) * 127  # 127 makes the int8 scale exactly 1
    y = bitkernels.ternary_linear(x, bitkernels.pack_ternary(w), scale, act_bits=act_bits)
    assert torch.equal(y, (127 * 0.25 * w).t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, dtype, device):
    args = inputs(case, device, dtype, requires_grad=True)
    wide_args = wide(*args)
    y = bitkernels.ternary_linear(*args)
    ref = reference.ternary_linear(*wide_args)
    grad = torch.randn_like(y)
    y.backward(grad)
    ref.backward(grad.double().cpu())
    x, w_packed, scale, _ = wide_args
    scale_terms = reference.ternary_linear(x, w_packed, torch.ones_like(scale)) * grad.double().cpu()
    for name, t, t_ref in zip(("x", "w_packed", "scale", "bias"), args, wide_args, strict=True):
        if t is not None and t.is_floating_point():
            tolerance = TOLERANCE[dtype] * (cancellation(scale_terms) if name == "scale" else 1)
            assert_close(f"d{name}", t.grad, t_ref.grad, tolerance)


def test_int8_gradient_is_straight_through(device):
    x, w_packed, scale, bias = inputs(Case((3,), 20, 40, True), device, torch.float32, requires_grad=True)
    grad = torch.randn(3, 20, device=device)
    bitkernels.ternary_linear(x, w_packed, scale, bias, act_bits=8).backward(grad)
    assert_close("dx", x.grad, grad @ (reference.unpack_ternary(w_packed, 40) * scale))


def test_gradcheck():
    x, w_packed, scale, bias = inputs(Case((3,), 5, 35, True), "cpu", torch.float64, requires_grad=True)

    def function(x, scale, bias):
        return bitkernels.ternary_linear(x, w_packed, scale, bias)

    assert torch.autograd.gradcheck(function, (x, scale, bias))


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("M", [1, 40])
def test_noncontiguous_and_same_bits_every_run(M, act_bits, device):
    x, w_packed, scale, bias = inputs(Case((M,), 50, 70, bias=True), device, torch.bfloat16)
    expected = bitkernels.ternary_linear(x, w_packed, scale, bias, act_bits)
    words = w_packed.view(torch.int32).t().contiguous().t().view(torch.uint32)
    y = bitkernels.ternary_linear(noncontiguous(x), words, scale, noncontiguous(bias), act_bits)
    assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize(("M", "N", "K"), [(512, 2560, 5120), (1024, 10576, 2560)])
def test_tiles_cut_between_blocks(M, N, K, act_bits):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    args = inputs(Case((M,), N, K, bias=True), "cuda", torch.bfloat16)
    y = bitkernels.ternary_linear(*args, act_bits)
    some = slice(None, None, 37)
    x, w_packed, scale, bias = args
    if act_bits:
        cpu = [a.cpu() for a in (x[some], w_packed, scale, bias)]
        assert torch.equal(y[some].cpu(), reference.ternary_linear(*cpu, act_bits))
    else:
        assert_close("y", y[some], reference.ternary_linear(*wide(x[some], w_packed, scale, bias)))
    assert all(torch.equal(bitkernels.ternary_linear(*args, act_bits), y) for _ in range(10))


@pytest.mark.parametrize("act_bits", [None, 8])
def test_opcheck_compile_and_cuda_graph(act_bits, device):
    args = (*inputs(Case((3, 4), 20, 40, bias=True), device, torch.float32), act_bits)
    opcheck(torch.ops.bitkernels.ternary_linear.default, args)
    grad = torch.randn(3, 4, 20, device=device)
    opcheck(torch.ops.bitkernels.ternary_linear_backward.default, (grad, args[1], args[2], 40), grad=False)
    check_compile(bitkernels.ternary_linear, args)
    if device == "cuda":
        check_cuda_graph(bitkernels.ternary_linear, args)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(2, 49)}, "ternary_linear: w_packed .*"),
        ({"x": torch.ones(2, 40, dtype=torch.int32)}, "ternary_linear: x must be float32.*Int"),
        ({"w_packed": torch.zeros(20, 3, dtype=torch.int32)}, "ternary_linear: w_packed must be UInt32, got Int"),
        ({"w_packed": torch.zeros(20, 2, dtype=torch.uint32)}, "ternary_linear: w_packed must have .* 3 words.*got 2"),
        ({"scale": torch.ones(2)}, r"ternary_linear: scale .*got \[2\]"),
        ({"bias": torch.ones(21)}, r"ternary_linear: bias .*got \[21\]"),
        ({"act_bits": 4}, "ternary_linear: act_bits must be None or 8, got 4"),
    ],
)
def test_bad_input(change, words):
    names = ("x", "w_packed", "scale", "bias")
    good = dict(zip(names, inputs(Case((2,), 20, 40, bias=True), "cpu", torch.float32), strict=True))
    with pytest.raises(ValueError, match=words):
        bitkernels.ternary_linear(**{**good, **change})
