"""The last norm and the head of a decode step against RMSNorm and F.linear."""

import torch
import torch.nn.functional as F
from bench_dense_linear import VOCABULARY, WIDTH
from harness import TOLERANCE, Contender, nbytes, on_copies, verify

import bitkernels
from bitkernels import reference


def pytest_generate_tests(metafunc):
    metafunc.parametrize("model", WIDTH)
    metafunc.parametrize("B", [1, 8])


def plain(residual, norm_weight, weight):
    return F.linear(F.rms_norm(residual, norm_weight.shape, norm_weight, 1e-5).to(weight.dtype), weight)


def test_head_step(model, B, device, compare):
    K, dtype = WIDTH[model], torch.bfloat16
    residual, norm_weight = torch.randn(B, K, device=device), torch.rand(K, device=device) + 0.5
    args = residual, norm_weight, torch.randn(VOCABULARY, K, device=device).to(dtype)
    y = bitkernels.head_step(*args)
    verify(y.cpu(), reference.head_step(*(a.cpu().double() for a in args)), TOLERANCE[dtype])
    contenders = [
        Contender(name, on_copies(function, *args), nbytes(*args, y))
        for name, function in (("bitkernels", bitkernels.head_step), ("F.rms_norm, F.linear", plain))
    ]
    compare(f"{model}, B={B}", contenders[0], contenders[1:], 2 * B * VOCABULARY * K, shape=[B, VOCABULARY, K],
            dtype=str(dtype))  # fmt: skip
