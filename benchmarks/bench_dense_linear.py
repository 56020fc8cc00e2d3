"""The head of a decode step, with 16 and 8 bits a weight, against F.linear."""

import torch
import torch.nn.functional as F
from harness import TOLERANCE, Contender, device_of, nbytes, on_copies, verify

import bitkernels
from bitkernels import reference

VOCABULARY, WIDTH = 32000, {"780M": 1536, "2.7B": 2560}


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("model", WIDTH)
    metafunc.parametrize("M", [1, 8])
    # A GPU takes F.linear itself.
    metafunc.parametrize("bits", [16] if cuda else [16, 8])


def test_dense_linear(model, M, bits, device, compare):
    N, K = VOCABULARY, WIDTH[model]
    dtype = torch.bfloat16
    x, dense = torch.randn(M, K, device=device).to(dtype), torch.randn(N, K, device=device).to(dtype)
    args = (x, dense)
    if bits == 8:
        weight = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device)
        args = (x, weight, torch.rand(N, device=device))
    y = bitkernels.dense_linear(*args)
    verify(y.cpu(), reference.dense_linear(*(a.cpu().double() for a in args)), TOLERANCE[dtype])
    ours = Contender("bitkernels", on_copies(bitkernels.dense_linear, *args), nbytes(*args, y))
    peer = Contender("F.linear bf16", on_copies(F.linear, x, dense), nbytes(x, dense, y))
    compare(f"{model} head, {bits} bits, M={M}", ours, [peer], 2 * M * N * K, shape=[M, N, K], dtype=str(dtype))
