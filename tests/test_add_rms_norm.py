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
    residual: bool = True
    eps: float = 1e-5

    def __str__(self):
        return f"{'x'.join(map(str, self.batch)) or 'vector'}-{self.width}-{'' if self.residual else 'begins'}"


CASES = [
    Case((), 5),
    Case((1,), 1, eps=0.1),  # a gradient of size eps, which a small eps leaves to cancellation
    Case((3,), 31, residual=False),
    Case((2, 3), 33, eps=1e-2),
    Case((2, 50), 768),
    Case((1100,), 12),
    Case((0,), 7),
]


def inputs(case, device, dtype, requires_grad=False):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (*case.batch, case.width)
    residual = torch.randn(shape, dtype=acc) if case.residual else None
    tensors = (residual, torch.randn(shape).to(dtype), torch.randn(case.width).to(acc))
    return [None if t is None else t.to(device).requires_grad_(requires_grad) for t in tensors]


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("outputs", ["both", "total", "normed"])
def test_value_and_gradients(case, dtype, outputs, device):
    tensors = inputs(case, device, dtype, requires_grad=True)
    leaves = wide(*tensors)
    total, normed = bitkernels.add_rms_norm(*tensors, case.eps)
    total_ref, normed_ref = reference.add_rms_norm(*leaves, case.eps)
    assert (total.dtype, normed.dtype) == (torch.float32, dtype)
    assert_close("total", total, total_ref)
    assert_close("normed", normed, normed_ref)
    pairs = {"both": [(total, total_ref), (normed, normed_ref)], "total": [(total, total_ref)],
             "normed": [(normed, normed_ref)]}[outputs]  # fmt: skip
    for i, (y, y_ref) in enumerate(pairs):
        grad = torch.randn_like(y)
        more = i + 1 < len(pairs)
        y.backward(grad, retain_graph=more)
        y_ref.backward(grad.double().cpu(), retain_graph=more)
    for name, t, leaf in zip(("residual", "branch", "weight"), tensors, leaves, strict=True):
        if t is not None and leaf.grad is not None:
            assert t.grad.dtype == t.dtype
            assert_close(f"d{name}", t.grad, leaf.grad, TOLERANCE[dtype])


@pytest.mark.memcheck
@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_norm_alone(case, dtype, out, device):
    _, x, weight = inputs(case, device, dtype)
    normed = bitkernels.rms_norm(x, weight, case.eps, out)
    assert normed.dtype == out
    assert_close("normed", normed, reference.add_rms_norm(None, *wide(x, weight), case.eps)[1], TOLERANCE[out])
    assert torch.equal(bitkernels.rms_norm(*map(noncontiguous, (x, weight)), case.eps, out), normed)


def test_opcheck_of_the_norm_alone(device):
    _, x, weight = inputs(CASES[3], device, torch.float32)
    opcheck(torch.ops.bitkernels.rms_norm, (x, weight, 1e-5, torch.bfloat16), grad=False)


def test_gradcheck():
    tensors = inputs(Case((2, 3), 6), "cpu", torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bitkernels.add_rms_norm, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norm_in_another_dtype(dtype, device):
    """A float32 embedding begins the stream of a model whose products are in 16 bits, and the other way round."""
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    tensors = inputs(CASES[4], device, other, requires_grad=True)
    leaves = wide(*tensors)
    total, normed = bitkernels.add_rms_norm(*tensors, dtype=dtype)
    assert (total.dtype, normed.dtype) == (torch.float32, dtype)
    grad = torch.randn_like(normed)
    (normed * grad).sum().backward()
    normed_ref = reference.add_rms_norm(*leaves)[1]
    (normed_ref * grad.double().cpu()).sum().backward()
    assert_close("normed", normed, normed_ref)
    for t, leaf in zip(tensors, leaves, strict=True):
        assert_close("gradient", t.grad, leaf.grad, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noncontiguous(dtype, device):
    tensors = inputs(CASES[4], device, dtype)
    expected = bitkernels.add_rms_norm(*tensors)
    assert all(map(torch.equal, bitkernels.add_rms_norm(*map(noncontiguous, tensors)), expected))


def test_same_bits_every_run(device):
    residual, branch, weight = inputs(CASES[5], device, torch.bfloat16)
    args = (residual, branch, residual + 1, weight, 1e-5, torch.bfloat16)
    first, again = (torch.ops.bitkernels.add_rms_norm_backward(*args) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=str)
def test_opcheck(case, device):
    residual, branch, weight = inputs(case, device, torch.bfloat16)
    opcheck(torch.ops.bitkernels.add_rms_norm, (residual, branch, weight, 1e-5, torch.bfloat16))
    args = (None, branch, branch.float(), weight, 1e-5, torch.bfloat16)
    opcheck(torch.ops.bitkernels.add_rms_norm_backward, args, grad=False)


@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=str)
def test_compile(case, device):
    tensors = inputs(case, device, torch.float32, requires_grad=True)
    leaves = [t for t in tensors if t is not None]
    check_compile(bitkernels.add_rms_norm, tensors)
    check_compiled_gradients(lambda *t: sum(y.square().sum() for y in bitkernels.add_rms_norm(*t)), tensors, leaves)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_cuda_graph():
    check_cuda_graph(bitkernels.add_rms_norm, inputs(CASES[4], "cuda", torch.bfloat16))


def test_errors(device):
    residual, branch, weight = inputs(CASES[3], device, torch.bfloat16)
    for args, message in (
        ((residual.half(), branch, weight), "residual must be (torch.float32, got torch.float16|Float, got Half)"),
        ((residual[:1], branch, weight), r"residual must be of shape \[2, 3, 33\], got \[1, 3, 33\]"),
        ((residual, branch, weight[:3]), r"weight must be of shape \[33\], got \[3\]"),
        ((residual, branch.int(), weight), "branch must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(ValueError, match=f"add_rms_norm: {message}"):
            bitkernels.add_rms_norm(*args)
    with pytest.raises(ValueError, match="rms_norm: weight must be"):
        bitkernels.rms_norm(branch, weight[:-1])
    with pytest.raises(ValueError, match="rms_norm: dtype must be a floating dtype, got torch.int8"):
        bitkernels.rms_norm(branch, weight, dtype=torch.int8)
    with pytest.raises(ValueError, match="add_rms_norm: dtype must be a floating dtype, got torch.int8"):
        bitkernels.add_rms_norm(residual, branch, weight, dtype=torch.int8)
