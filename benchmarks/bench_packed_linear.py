"""packed_linear against the bf16 layer it replaces."""

import peers
import torch
import torch.nn.functional as F
from harness import LAYERS, Contender, device_of, nbytes, on_copies, verify

import bitkernels
from bitkernels import reference

GPU_ROWS = [1, 8, 32, 128, 1024, 4096]
CPU_ROWS = [1, 32]


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    layers = LAYERS if cuda else {k: v for k, v in LAYERS.items() if k != "large"}
    metafunc.parametrize("layer", layers)
    metafunc.parametrize("M", GPU_ROWS if cuda else CPU_ROWS)


def test_packed_linear(layer, M, device, compare):
    N, K = LAYERS[layer]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(M, K, device=device).to(dtype)
    w_packed = bitkernels.pack_sign(torch.randn(N, K, device=device))
    alpha = (torch.rand(K, device=device) + 0.5) / K**0.5
    beta = torch.randn(K, device=device) * 0.1 / K**0.5
    dense = reference.unpack_sign(w_packed, K) * alpha + beta
    y = bitkernels.packed_linear(x, w_packed, alpha, beta)
    verify(y, F.linear(x.double(), dense.double()))

    # Bytes: the packed weight, both scales and x once, y once.
    args = (x, w_packed, alpha, beta)
    ours = Contender("bitkernels", on_copies(bitkernels.packed_linear, *args), nbytes(*args, y))
    others = [peers.dense_linear(x.bfloat16(), dense.bfloat16(), y.bfloat16())]
    if device == "cpu":
        others.append(peers.dense_linear(x, dense, y))
    if layer == "2.7B in_proj" and M in (1, 32, 1024):  # GemLite tunes for 10 to 20 s a shape
        codes = (reference.unpack_sign(w_packed, K) > 0).to(torch.uint8)
        others.append(peers.gemlite_linear("GemLite 1-bit", 1, x, codes, torch.full((1, 1), 2.0, device=device), 0.5))
    compare(
        f"{layer}, M={M}", ours, others, 2 * M * N * K, shape=[M, N, K], dtype=str(dtype),
        headline=layer == "2.7B in_proj",
    )  # fmt: skip
