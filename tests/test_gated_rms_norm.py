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


@dataclass
class Case:
    batch: tuple[int, ...]
    width: int
    group_size: int | None = None
    eps: float = 1e-5

    def __str__(self):
        return f"{'x'.join(map(str, self.batch)) or 'vector'}-{self.width}-group{self.group_size}"


CASES = [
    Case((), 5),
    Case((1,), 1, eps=0.1),  # a gradient of size eps, which a small eps leaves to cancellation
    Case((3,), 31),
    Case((2, 3), 32, 16),
    Case((33,), 33, 11, eps=1e-2),
    Case((2, 50), 768),
    Case((100,), 96, 48),
    Case((0,), 7),
]


def inputs(case, device, dtype, requires_grad=False):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, z = (torch.randn(*case.batch, case.width).to(dtype) for _ in range(2))
    weight = torch.randn(case.width).to(acc)
    return [t.to(device).requires_grad_(requires_grad) for t in (x, z, weight)]


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case, dtype, device):
    tensors = inputs(case, device, dtype, requires_grad=True)
    leaves = wide(*tensors)
    y = bitkernels.gated_rms_norm(*tensors, case.eps, case.group_size)
    y_ref = reference.gated_rms_norm(*leaves, case.eps, case.group_size)
    assert y.dtype == dtype
    assert_close("y", y, y_ref)
    grad = torch.randn_like(y)
    y.backward(grad)
    y_ref.backward(grad.double().cpu())
    for name, t, leaf in zip(("x", "z", "weight"), tensors, leaves, strict=True):
        assert t.grad.dtype == t.dtype
        assert_close(f"d{name}", t.grad, leaf.grad, TOLERANCE[dtype])


def test_gradcheck():
    tensors = inputs(Case((2, 3), 6, 3), "cpu", torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: bitkernels.gated_rms_norm(*t, group_size=3), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noncontiguous(dtype, device):
    """z as a slice of the block's projection, then every argument at every other position."""
    x, z, weight = inputs(CASES[5], device, dtype)
    expected = bitkernels.gated_rms_norm(x, z, weight)
    wider = torch.randn(2, 50, 1000, device=device).to(dtype)
    wider[..., 100:868] = z
    assert torch.equal(bitkernels.gated_rms_norm(x, wider[..., 100:868], weight), expected)
    x_turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(bitkernels.gated_rms_norm(x_turned, noncontiguous(z), noncontiguous(weight)), expected)


def test_expanded_gradient(device):
    tensors = inputs(CASES[3], device, torch.float32, requires_grad=True)
    leaves = wide(*tensors)
    bitkernels.gated_rms_norm(*tensors).sum().backward()
    reference.gated_rms_norm(*leaves).sum().backward()
    for t, leaf in zip(tensors, leaves, strict=True):
        assert_close("gradient", t.grad, leaf.grad)


def test_same_bits_every_run(device):
    x, z, weight = inputs(CASES[5], device, torch.bfloat16)
    y = bitkernels.gated_rms_norm(x, z, weight)
    grads = torch.ops.bitkernels.gated_rms_norm_backward(y, x, z, weight)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = torch.ops.bitkernels.gated_rms_norm_backward(y, x, z, weight)
        assert torch.equal(bitkernels.gated_rms_norm(x, z, weight), y)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e4])
def test_extreme_inputs(value, device):
    x, z = (torch.full((2, 16), s * value, device=device, requires_grad=True) for s in (1, -1))
    weight = torch.ones(16, device=device)
    y = bitkernels.gated_rms_norm(x, z, weight)
    assert_close("y", y, reference.gated_rms_norm(*wide(x, z, weight)))
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert z.grad.isfinite().all()


def test_opcheck(device):
    args = (*inputs(Case((2, 3), 8), device, torch.float32), 1e-5, 4)
    opcheck(torch.ops.bitkernels.gated_rms_norm.default, args)
    opcheck(torch.ops.bitkernels.gated_rms_norm_backward.default, (args[0], *args), grad=False)


def test_compile_and_cuda_graph(device):
    args = inputs(Case((2, 3), 8), device, torch.float32, requires_grad=True)
    plain = [a.detach() for a in args]
    check_compile(bitkernels.gated_rms_norm, plain)

    def loss(*args):
        return bitkernels.gated_rms_norm(*args).square().sum()

    check_compiled_gradients(loss, args, args)
    if device == "cuda":
        check_cuda_graph(bitkernels.gated_rms_norm, plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, "gated_rms_norm: x must be float32.*Int"),
        ({"z": torch.ones(2, 9)}, r"gated_rms_norm: z .*got \[2, 9\]"),
        ({"z": torch.ones(2, 8).half()}, "gated_rms_norm: z must be Float, got Half"),
        ({"weight": torch.ones(9)}, r"gated_rms_norm: weight .*got \[9\]"),
        ({"group_size": 3}, "gated_rms_norm: group_size must divide .* 8, got 3"),
        ({"group_size": 0}, "gated_rms_norm: group_size must divide .* 8, got 0"),
    ],
)
def test_bad_input(change, words, device):
    good = dict(zip(("x", "z", "weight"), inputs(Case((2,), 8), device, torch.float32), strict=True))
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=words):
        bitkernels.gated_rms_norm(**{**good, **change})
