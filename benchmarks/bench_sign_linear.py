"""Training with sign_linear, forward and backward, against F.linear and the published simulation.

Latent weights and scales are float32. On a GPU activations are bfloat16, and so are the weights of F.linear.
"""

import torch
import torch.nn.functional as F
from harness import LAYERS, Contender, device_of, nbytes, on_copies, peak_megabytes, verify, with_gradients

import bitkernels
from bitkernels import reference


class Sign(torch.autograd.Function):
    """The straight-through sign of the published code."""

    @staticmethod
    def forward(ctx, w):
        return torch.sign(w)

    @staticmethod
    def backward(ctx, grad):
        return grad


def simulated(x, weight, alpha, beta):
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        return F.linear(x, alpha * Sign.apply(weight) + beta)


def dense(x, weight):
    return F.linear(x, weight)


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("layer", ["780M in_proj", "2.7B in_proj"] if cuda else ["780M out_proj"])
    metafunc.parametrize("M", [4096, 16384] if cuda else [128])


def test_sign_linear(layer, M, device, compare):
    N, K = LAYERS[layer]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(M, K, device=device).to(dtype).requires_grad_()
    weight = torch.randn(N, K, device=device).requires_grad_()
    alpha = ((torch.rand(K, device=device) + 0.5) / K**0.5).requires_grad_()
    beta = (torch.randn(K, device=device) * 0.1 / K**0.5).requires_grad_()
    args = (x, weight, alpha, beta)
    rows = slice(0, 256)
    verify(
        bitkernels.sign_linear(*args)[rows], reference.sign_linear(x[rows].double(), *(a.double() for a in args[1:]))
    )

    # Bytes: x, the weight and the scales, their gradients, and y with its gradient, once each.
    size = 2 * nbytes(*args) + 2 * M * N * x.element_size()
    calls = {
        "bitkernels": on_copies(with_gradients(bitkernels.sign_linear), *args),
        "F.linear": on_copies(with_gradients(dense), x, weight.detach().to(dtype).requires_grad_()),
        "simulation": on_copies(with_gradients(simulated), *args),
    }
    ours, *others = [Contender(name, make, size) for name, make in calls.items()]
    memory = {f"{name}, MB": peak_megabytes(make()) for name, make in calls.items()} if device == "cuda" else {}
    compare(
        f"{layer}, M={M}, forward+backward", ours, others, 6 * M * N * K, shape=[M, N, K], dtype=str(dtype),
        headline=M == 16384, **memory,
    )  # fmt: skip
