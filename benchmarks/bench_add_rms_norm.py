"""The residual's sum and its norm, forward and with the backward, against PyTorch's operators.

On a GPU the residual is float32, the branch and the norm bf16.
"""

import pytest
import torch
import torch.nn.functional as F
from harness import Contender, device_of, nbytes, on_copies, verify

import bitkernels
from bitkernels import reference

WIDTHS = {"22m": 512, "780M": 1536, "2.7B": 2560}


def parts(residual, branch, weight):
    total = residual + branch.float()
    return total, F.rms_norm(total, weight.shape, weight, 1e-5).to(branch.dtype)


def with_gradients(function):
    """Forward and backward, for fixed gradients of both outputs."""
    gradients = []

    def both(*args):
        outputs = function(*args)
        if not gradients:
            gradients.extend(torch.randn_like(y) for y in outputs)
        return torch.autograd.grad(outputs, args, gradients)

    return both


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("model", WIDTHS)
    metafunc.parametrize("M", [16384] if cuda else [512])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_add_rms_norm(model, M, backward, device, compare):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (M, WIDTHS[model])
    kinds = ((shape, torch.float32), (shape, dtype), (shape[1:], torch.float32))
    residual, branch, weight = (torch.randn(s, device=device).to(to).requires_grad_(backward) for s, to in kinds)
    arguments = (residual, branch, weight)
    total, normed = bitkernels.add_rms_norm(*arguments)
    verify(normed, reference.add_rms_norm(*(t.detach().double() for t in arguments))[1])

    # Bytes: both arguments and both results once; the backward reads the total and both gradients, and writes both.
    size = nbytes(residual, branch, total, normed)
    size += nbytes(total) + size if backward else 0
    wrap = with_gradients if backward else lambda f: f
    ours = Contender("bitkernels", on_copies(wrap(bitkernels.add_rms_norm), *arguments), size)
    peer = Contender("PyTorch", on_copies(wrap(parts), *arguments), size)
    name = f"{model}, M={M}, {'forward+backward' if backward else 'forward'}"
    compare(name, ours, [peer], 0.0, shape=[M, WIDTHS[model]], dtype=str(dtype))
