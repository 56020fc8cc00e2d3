import pytest
import torch
from helpers import (
    TOLERANCE,
    assert_close,
    cancellation,
    check_compile,
    check_compiled_gradients,
    noncontiguous,
    opcheck,
    wide,
)
from test_packed_linear import Case

import bitkernels
from bitkernels import reference

CASES = [
    Case((1,), 1, 1),
    Case((), 5, 33),
    Case((4,), 64, 31, bias=True),
    Case((2, 9), 65, 32, "row", bias=True),
    Case((2, 20), 127, 97, "single"),
    Case((130,), 200, 320, bias=True),
    Case((0,), 5, 33, bias=True),
]


def inputs(case, device, dtype, latent=torch.float32, requires_grad=False):
    """x, weight, alpha, beta, bias."""
    shape = {"column": (1, case.K), "row": (case.N, 1), "single": (1,)}[case.scales]
    x = torch.randn(*case.batch, case.K, device=device).to(dtype)
    weight = torch.randn(case.N, case.K, device=device).to(latent)
    weight[..., ::5] = 0.0
    alpha = (torch.rand(shape, device=device) + 0.1).to(torch.promote_types(latent, torch.float32))
    beta = torch.randn(shape, device=device).to(alpha.dtype) * 0.1
    bias = torch.randn(case.N, device=device).to(alpha.dtype) if case.bias else None
    for t in (x, weight, alpha, beta, bias):
        if t is not None:
            t.requires_grad_(requires_grad)
    return x, weight, alpha, beta, bias


@pytest.mark.memcheck
@pytest.mark.parametrize(
    ("dtype", "latent"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case, dtype, latent, device):
    args = inputs(case, device, dtype, latent, requires_grad=True)
    wide_args = wide(*args)
    y = bitkernels.sign_linear(*args)
    ref = reference.sign_linear(*wide_args)
    assert y.dtype == dtype
    assert_close("y", y, ref)
    grad = torch.randn_like(y)
    y.backward(grad)
    ref.backward(grad.double().cpu())
    for name, t, t_ref in zip(("x", "weight", "alpha", "beta", "bias"), args, wide_args, strict=True):
        if t is not None:
            assert t.grad.dtype == t.dtype
            # dW is a product of tensors in the activations' dtype, whatever the latent weight's; a single
            # scale's gradient is its sum, which may cancel.
            tolerance = max(TOLERANCE[dtype], TOLERANCE[t.dtype])
            if case.scales == "single" and name in ("alpha", "beta"):
                x, weight = wide_args[:2]
                terms = grad.double().cpu().flatten(0, -2).t() @ x.flatten(0, -2)
                tolerance *= cancellation(terms * torch.where(weight >= 0, 1, -1) if name == "alpha" else terms)
            assert_close(f"d{name}", t.grad, t_ref.grad, tolerance)


@pytest.mark.memcheck
@pytest.mark.parametrize("scales", ["column", "row", "single"])
@pytest.mark.parametrize("latent", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (65, 264), (300, 520)], ids=str)
def test_weight_backward(shape, dtype, latent, scales, device):
    N, K = shape
    product = torch.randn(N, K, device=device).to(dtype)
    _, weight, alpha, _, _ = inputs(Case((), N, K, scales), device, dtype)
    w_packed = bitkernels.pack_sign(weight)
    dweight, dalpha, dbeta = torch.ops.bitkernels.sign_linear_weight_backward(product, w_packed, alpha, latent)
    wide_product, wide_alpha = wide(product, alpha)
    signed = wide_product * torch.where(weight.cpu() >= 0, 1.0, -1.0)
    over = 0 if scales == "column" else 1
    assert dweight.dtype == latent
    assert_close("dweight", dweight, wide_product * wide_alpha)
    assert dalpha.dtype == dbeta.dtype == torch.float32
    tolerance = TOLERANCE[torch.float32] * max(cancellation(t) for t in (*signed.unbind(1 - over), signed))
    assert_close("dalpha", dalpha, signed.sum(over), tolerance)
    assert_close("dbeta", dbeta, wide_product.sum(over), tolerance)
    only_weight = torch.ops.bitkernels.sign_linear_weight_backward(product, w_packed, alpha, latent, True, False)
    only_scales = torch.ops.bitkernels.sign_linear_weight_backward(product, w_packed, alpha, latent, False, True)
    assert torch.equal(only_weight[0], dweight)
    assert torch.equal(only_scales[1], dalpha)
    assert [t.numel() for t in (only_weight[1], only_weight[2], only_scales[0])] == [0, 0, 0]


def test_weight_backward_opcheck_and_bad_input(device):
    product, alpha = torch.randn(20, 40, device=device), torch.ones(20, 1, device=device)
    w_packed = bitkernels.pack_sign(product)
    op = torch.ops.bitkernels.sign_linear_weight_backward
    for needed in ((True, True), (True, False), (False, True)):
        opcheck(op.default, (product, w_packed, alpha, torch.bfloat16, *needed), grad=False)
    assert torch.equal(
        op(noncontiguous(product), w_packed, alpha, torch.float32)[1], op(product, w_packed, alpha, torch.float32)[1]
    )
    with pytest.raises(ValueError, match=r"sign_linear_weight_backward: product must be \[N, K\]"):
        op(product[0], w_packed, alpha, torch.float32)
    with pytest.raises(ValueError, match="sign_linear_weight_backward: w_packed must have N = 19 rows, got 20"):
        op(product[:19], w_packed, alpha[:19], torch.float32)


@pytest.mark.parametrize("scales", ["column", "row", "single"])
def test_gradients_in_float64(scales):
    """gradcheck for what is smooth; the latent weight's gradient is the straight-through estimate by definition."""
    x, weight, alpha, beta, bias = inputs(
        Case((3,), 5, 35, scales, bias=True), "cpu", torch.float64, torch.float64, requires_grad=True
    )

    def function(x, alpha, beta, bias):
        return bitkernels.sign_linear(x, weight.detach(), alpha, beta, bias)

    assert torch.autograd.gradcheck(function, (x, alpha, beta, bias))
    args, wide_args = (x, weight, alpha, beta, bias), wide(x, weight, alpha, beta, bias)
    bitkernels.sign_linear(*args).square().sum().backward()
    reference.sign_linear(*wide_args).square().sum().backward()
    for t, t_ref in zip(args, wide_args, strict=True):
        torch.testing.assert_close(t.grad, t_ref.grad)


def test_sign_of_zero_is_plus_one(device):
    x, weight = torch.ones(1, 3, device=device), torch.tensor([[0.0, -0.0, -1.0]], device=device)
    one = torch.ones(1, device=device)
    assert bitkernels.sign_linear(x, weight, one, 0 * one).item() == 1.0


def test_keeps_packed_signs_rather_than_a_dense_weight(device):
    """What autograd saves is far smaller than W~."""
    x, weight, alpha, beta, _ = inputs(Case((1,), 256, 512), device, torch.float32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bitkernels.sign_linear(x, weight, alpha, beta)
    assert saved
    assert sum(t.numel() * t.element_size() for t in saved) < weight.numel()


def test_noncontiguous(device):
    args = inputs(Case((40,), 50, 70, bias=True), device, torch.float32)
    views = [noncontiguous(t) for t in args]
    assert torch.equal(bitkernels.sign_linear(*views), bitkernels.sign_linear(*args))


@pytest.mark.parametrize("scales", ["column", "row"])
def test_opcheck(scales, device):
    opcheck(
        torch.ops.bitkernels.sign_linear.default, inputs(Case((3, 4), 20, 40, scales, bias=True), device, torch.float32)
    )


def test_compiled_training(device):
    args = inputs(Case((4,), 20, 40, bias=True), device, torch.float32, requires_grad=True)
    check_compile(bitkernels.sign_linear, [a.detach() for a in args])

    def loss(*args):
        return bitkernels.sign_linear(*args).square().sum()

    check_compiled_gradients(loss, args, args, "inductor")


def test_bad_input():
    x, weight, alpha, beta, bias = inputs(Case((2,), 20, 40, bias=True), "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"sign_linear: weight must be \[N, 40\].*got \[20, 39\]"):
        bitkernels.sign_linear(x, weight[:, :39], alpha, beta, bias)
    with pytest.raises(ValueError, match=r"alpha .*got \[1, 39\]"):
        bitkernels.sign_linear(x, weight, alpha[:, :39], beta, bias)
