"""packed_linear against the bf16 layer it replaces."""

import peers
import pytest
import torch
import torch.nn.functional as F
from harness import LAYERS, Contender, device_of, memory_read, nbytes, on_copies, verify

import bitkernels
from bitkernels import reference

# The curve of costs that plot.py draws, and beyond it.
CURVE = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512]
FEW_ROWS = [1, 8, 32, 128, 1024, 4096]
GPU_ROWS = {layer: FEW_ROWS if layer == "780M out_proj" else [*CURVE, 1024, 4096, 16384] for layer in LAYERS}
# Of other activations, which are for decoding.
DECODE_ROWS = [1, 8, 32]
CPU_ROWS = {layer: [1, 8, 32, 512] if layer in ("2.7B in_proj", "large") else [1, 32] for layer in LAYERS}


def pytest_generate_tests(metafunc):
    if "M" not in metafunc.fixturenames:
        return
    if device_of(metafunc.config) == "cuda":
        few = dict.fromkeys(LAYERS, DECODE_ROWS)
        rows_of = {torch.bfloat16: GPU_ROWS, torch.float16: few, torch.float32: few}
    else:
        rows_of = {torch.float32: CPU_ROWS, torch.bfloat16: CPU_ROWS}
    cases = [(dtype, layer, M) for dtype, layers in rows_of.items() for layer, rows in layers.items() for M in rows]
    metafunc.parametrize(("dtype", "layer", "M"), cases, ids=str)


def test_memory_read(device, compare):
    """The bandwidth that plot.py's floor counts with."""
    if device == "cpu":
        pytest.skip("measured beside every row")
    compare("memory read", memory_read(device), [], 0)


def test_packed_linear(layer, M, dtype, device, peer_cases, compare):
    N, K = LAYERS[layer]
    x = torch.randn(M, K, device=device).to(dtype)
    w_packed = bitkernels.pack_sign(torch.randn(N, K, device=device))
    alpha = (torch.rand(K, device=device) + 0.5) / K**0.5
    beta = torch.randn(K, device=device) * 0.1 / K**0.5
    dense = bitkernels.unpack_sign(w_packed, K).mul_(alpha).add_(beta)
    y = bitkernels.packed_linear(x, w_packed, alpha, beta)
    some = slice(None, None, 8)  # the largest layer in float64 is more than a small machine holds
    verify(y[:, some], F.linear(x.double(), dense[some].double()))

    # Bytes: the packed weight, both scales and x once, y once.
    args = (x, w_packed, alpha, beta)
    ours = Contender("bitkernels", on_copies(bitkernels.packed_linear, *args), nbytes(*args, y))
    name, curve = f"{layer}, M={M}", device == "cuda" and dtype == torch.bfloat16
    if not curve:
        name += f", {str(dtype).removeprefix('torch.')} activations"
    dense_types = [dtype] if device == "cuda" else [torch.bfloat16, torch.float32]
    others = [peers.dense_linear(*(t.to(dense_type) for t in (x, dense, y))) for dense_type in dense_types]
    if layer == "2.7B in_proj" and M in (1, 32, 1024) and (curve or device == "cpu"):
        codes = (reference.unpack_sign(w_packed, K) > 0).to(torch.uint8)
        scale = torch.full((1, 1), 2.0, device=device)
        others.append(peers.gemlite_linear("GemLite 1-bit", 1, x, codes, scale, 0.5, peer_cases in name))
    if curve and M == 1:
        others.append(peers.bare_read(w_packed))
    compare(
        name, ours, others, 2 * M * N * K, shape=[M, N, K], dtype=str(dtype), weight_bytes=nbytes(w_packed),
        headline=layer == "2.7B in_proj" and dtype == torch.bfloat16 and (M in FEW_ROWS or device == "cpu"),
    )  # fmt: skip
