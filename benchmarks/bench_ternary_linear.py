"""ternary_linear, with 16/32-bit and with int8 activations, against the bf16 layer it replaces."""

import peers
import torch
import torch.nn.functional as F
from harness import LAYERS, Contender, device_of, nbytes, on_copies, verify

import bitkernels
from bitkernels import reference

CPU_ROWS = [1, 8, 32, 512]


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("layer", ["780M in_proj", "2.7B in_proj", "2.7B out_proj"] if cuda else ["2.7B in_proj"])
    if cuda:
        rows_of = {(torch.bfloat16, bits): [1, 8, 32, 128, 1024, 4096] for bits in (None, 8)}
        rows_of |= {(dtype, None): [1, 8, 32] for dtype in (torch.float16, torch.float32)}
    else:
        rows_of = {(torch.float32, None): CPU_ROWS, (torch.bfloat16, None): CPU_ROWS, (torch.float32, 8): CPU_ROWS}
    cases = [(*activations, M) for activations, rows in rows_of.items() for M in rows]
    metafunc.parametrize(("dtype", "act_bits", "M"), cases, ids=str)


def test_ternary_linear(layer, M, dtype, act_bits, device, peer_cases, compare):
    N, K = LAYERS[layer]
    x = torch.randn(M, K, device=device).to(dtype)
    w = torch.randint(-1, 2, (N, K), device=device, dtype=torch.int8)
    w_packed, scale = bitkernels.pack_ternary(w), torch.full((1,), K**-0.5, device=device)
    y = bitkernels.ternary_linear(x, w_packed, scale, act_bits=act_bits)
    dense = w.float() * scale
    if act_bits == 8:
        assert torch.equal(y, reference.ternary_linear(x, w_packed, scale, act_bits=8)), "wrong result, not timed"
    else:
        verify(y, F.linear(x.double(), dense.double()))

    # Bytes: the packed weight and x once, y once.
    args = (x, w_packed, scale)
    ours = Contender("bitkernels", on_copies(bitkernels.ternary_linear, *args, act_bits=act_bits), nbytes(*args, y))
    name = f"{layer}, M={M}, {'int8' if act_bits else str(dtype).removeprefix('torch.')} activations"
    dense_types = [dtype] if device == "cuda" else [torch.bfloat16, torch.float32]
    others = [peers.dense_linear(*(t.to(dense_type) for t in (x, dense, y))) for dense_type in dense_types]
    bf16 = dtype == torch.bfloat16 or device == "cpu"
    if layer == "2.7B in_proj" and M in (1, 32) and act_bits is None and bf16:
        codes = (w + 1).to(torch.uint8)
        others.append(peers.gemlite_linear("GemLite 2-bit", 2, x, codes, scale.view(1, 1), 1.0, peer_cases in name))
    compare(
        name, ours, others, 2 * M * N * K, shape=[M, N, K], dtype=str(dtype), weight_bytes=nbytes(w_packed),
        headline=layer == "2.7B in_proj" and M in ((1, 128) if device == "cuda" else (1, 8, 512)) and act_bits == 8,
    )  # fmt: skip
