import pytest
import torch
from helpers import TOLERANCE, assert_close, check_compile, noncontiguous, opcheck, wide
from test_ternary_linear import Case

import bitkernels
from bitkernels import reference

CASES = [Case((1,), 1, 1), Case((), 5, 33), Case((2, 9), 65, 32, True), Case((130,), 200, 320), Case((0,), 5, 33, True)]


def inputs(case, device, dtype, requires_grad=False):
    """x, weight, bias."""
    x = torch.randn(*case.batch, case.K, device=device).to(dtype)
    weight = torch.randn(case.N, case.K, device=device, dtype=torch.promote_types(dtype, torch.float32))
    bias = torch.randn(case.N, device=device, dtype=weight.dtype) if case.bias else None
    for t in (x, weight, bias):
        if t is not None:
            t.requires_grad_(requires_grad)
    return x, weight, bias


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case, dtype, act_bits, device):
    args = inputs(case, device, dtype, requires_grad=True)
    wide_args = wide(*args)
    y = bitkernels.ternary_linear_ste(*args, act_bits)
    ref = reference.ternary_linear_ste(*wide_args, act_bits)
    assert_close("y", y, ref)
    grad = torch.randn_like(y)
    y.backward(grad)
    ref.backward(grad.double().cpu())
    for name, t, t_ref in zip(("x", "weight", "bias"), args, wide_args, strict=True):
        if t is not None:
            assert t.grad.dtype == t.dtype
            assert_close(f"d{name}", t.grad, t_ref.grad, TOLERANCE[dtype])


def test_forward_is_the_packed_layer_to_the_bit(device):
    x, weight, bias = inputs(Case((7,), 50, 70, True), device, torch.bfloat16)
    y, w_packed, scale = torch.ops.bitkernels.ternary_linear_ste(x, weight, bias)
    assert torch.equal(y, bitkernels.ternary_linear(x, w_packed, scale, bias, act_bits=8))
    q, scale_ref = reference.quantize_ternary(weight)
    assert torch.equal(bitkernels.unpack_ternary(w_packed, 70), q)
    torch.testing.assert_close(scale, scale_ref)


def test_scale_of_a_large_weight(device):
    """The mean of millions of numbers, to the last digits: codes turn on it."""
    weight = torch.randn(2048, 4096, device=device)
    _, _, scale = torch.ops.bitkernels.ternary_linear_ste(weight[:1], weight, None, None)
    torch.testing.assert_close(scale.cpu().double(), weight.double().abs().mean().cpu()[None], rtol=1e-6, atol=0)


def test_noncontiguous(device):
    args = inputs(Case((40,), 50, 70, True), device, torch.float32)
    assert torch.equal(bitkernels.ternary_linear_ste(*map(noncontiguous, args)), bitkernels.ternary_linear_ste(*args))


def test_opcheck_and_compile(device):
    args = inputs(Case((3, 4), 20, 40, True), device, torch.float32)
    opcheck(torch.ops.bitkernels.ternary_linear_ste.default, args)
    check_compile(bitkernels.ternary_linear_ste, args)


def test_bad_input():
    x, weight, bias = inputs(Case((2,), 20, 40, True), "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"ternary_linear_ste: weight must be \[N, 40\], got \[20, 39\]"):
        bitkernels.ternary_linear_ste(x, weight[:, :39], bias)
