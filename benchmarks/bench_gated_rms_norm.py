"""The gated norm against plain PyTorch."""

import torch
from harness import Contender, device_of, nbytes, on_copies, verify

import bitkernels
from bitkernels import reference

WIDTHS = {"780M": 3072, "2.7B": 5120}


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("model", WIDTHS)
    metafunc.parametrize("M", [1, 2048, 16384] if cuda else [1, 512])


def test_gated_rms_norm(model, M, device, compare):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, z = (torch.randn(M, WIDTHS[model], device=device).to(dtype) for _ in range(2))
    weight = torch.randn(WIDTHS[model], device=device).to(dtype)
    y = bitkernels.gated_rms_norm(x, z, weight)
    verify(y, reference.gated_rms_norm(x.double(), z.double(), weight.double()))

    # Bytes: x and z once, y once.
    size = nbytes(x, z, weight, y)
    ours = Contender("bitkernels", on_copies(bitkernels.gated_rms_norm, x, z, weight), size)
    peer = Contender("PyTorch", on_copies(reference.gated_rms_norm, x, z, weight), size)
    compare(f"{model}, M={M}", ours, [peer], 8 * x.numel(), shape=[M, WIDTHS[model]], dtype=str(dtype))
