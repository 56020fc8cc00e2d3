"""The causal convolution with SiLU against PyTorch's own convolution."""

import torch
import torch.nn.functional as F
from harness import Contender, device_of, nbytes, on_copies, verify

import bitkernels
from bitkernels import reference

CHANNELS = {"780M": 3072 + 256, "2.7B": 5120 + 256}


def torch_conv(x, weight, bias):
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=weight.shape[1] - 1, groups=weight.shape[0])
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("model", CHANNELS)
    metafunc.parametrize(("B", "T"), [(1, 2048), (8, 2048)] if cuda else [(1, 512)])


def test_causal_conv1d(model, B, T, device, compare):
    C = CHANNELS[model]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(B, T, C, device=device).to(dtype)
    weight, bias = (torch.randn(C, 4, device=device) * 0.5).to(dtype), torch.randn(C, device=device).to(dtype)
    y = bitkernels.causal_conv1d(x, weight, bias)
    verify(y, reference.causal_conv1d(x.double(), weight.double(), bias.double()))

    # Bytes: x once, y once; the taps are small.
    size = nbytes(x, weight, bias, y)
    ours = Contender("bitkernels", on_copies(bitkernels.causal_conv1d, x, weight, bias), size)
    peer = Contender("F.conv1d", on_copies(torch_conv, x, weight, bias), size)
    compare(f"{model}, B={B}, T={T}", ours, [peer], 8 * x.numel(), shape=[B, T, C], dtype=str(dtype))
