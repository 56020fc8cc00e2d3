"""Training with ternary_linear_ste, forward and backward, against F.linear and the published simulation.

Latent weights are float32. On a GPU activations are bfloat16, and so are the weights of F.linear.
"""

import torch
import torch.nn.functional as F
from harness import LAYERS, Contender, device_of, nbytes, on_copies, peak_megabytes, verify, with_gradients

import bitkernels
from bitkernels import reference


class Ternary(torch.autograd.Function):
    """The straight-through weights of the published code."""

    @staticmethod
    def forward(ctx, w):
        scale = 1.0 / w.abs().mean().clamp(min=1e-5)
        return (w * scale).round().clamp(-1, 1) / scale

    @staticmethod
    def backward(ctx, grad):
        return grad


class Int8(torch.autograd.Function):
    """The straight-through activations of the published code."""

    @staticmethod
    def forward(ctx, x):
        scale = 127.0 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return ((x * scale).round().clamp(-128, 127) / scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


def simulated(x, weight, bias, act_bits):
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        return F.linear(x if act_bits is None else Int8.apply(x), Ternary.apply(weight), bias)


def dense(x, weight):
    return F.linear(x, weight)


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("layer", ["780M in_proj", "2.7B in_proj"] if cuda else ["780M out_proj"])
    metafunc.parametrize("M", [16384] if cuda else [128])
    metafunc.parametrize("act_bits", [None, 8])


def test_ternary_linear_ste(layer, M, act_bits, device, compare):
    N, K = LAYERS[layer]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(M, K, device=device).to(dtype).requires_grad_()
    weight = torch.randn(N, K, device=device).requires_grad_()
    args = (x, weight, None, act_bits)
    some = slice(0, 256)
    verify(
        bitkernels.ternary_linear_ste(*args)[some],
        reference.ternary_linear_ste(x[some].double(), weight.double(), None, act_bits),
    )

    # Bytes: x and the weight, their gradients, and y with its gradient, once each.
    size = 2 * nbytes(x, weight) + 2 * M * N * x.element_size()
    calls = {
        "bitkernels": on_copies(with_gradients(bitkernels.ternary_linear_ste), *args),
        "F.linear": on_copies(with_gradients(dense), x, weight.detach().to(dtype).requires_grad_()),
        "simulation": on_copies(with_gradients(simulated), *args),
    }
    ours, *others = [Contender(name, make, size) for name, make in calls.items()]
    memory = {f"{name}, MB": peak_megabytes(make()) for name, make in calls.items()} if device == "cuda" else {}
    activations = "int8" if act_bits else str(dtype).removeprefix("torch.")
    compare(
        f"{layer}, M={M}, {activations} activations, forward+backward", ours, others, 6 * M * N * K, shape=[M, N, K],
        dtype=str(dtype), headline=M == 16384, **memory,
    )  # fmt: skip
