"""The first call of an operator in a fresh process, and the slowest first call of further shapes.

Operators on Triton compile in the first call ever; in later processes they find what they need in Triton's cache. On
Hopper GPUs the scan, gated or not, and its gradients are CUDA C++: there the mixer alone asks for anything.
torch has had a backward before: its first one imports for two seconds.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_ssd_scan import Case, inputs
from harness import HEADDIM, HEADS, LAYERS, STATE, quantity

import bitkernels

ROOT = Path(__file__).resolve().parent.parent
CASES = [
    "ssd_scan, forward+backward",
    "ssd_scan, gated, forward+backward",
    "mamba2_mixer, forward",
    "mamba2_mixer, forward+backward",
    "packed_linear",
    "ternary_linear, int8",
]


def pytest_generate_tests(metafunc):
    metafunc.parametrize("case", CASES)


def scan(B: int, T: int, gated: bool):
    args, keywords = inputs(Case("2.7B", B, T), "cuda", True)
    dy = torch.randn_like(args[0])
    if gated:
        keywords["z"] = torch.randn_like(dy)
    return lambda: torch.autograd.grad(bitkernels.ssd_scan(*args, **keywords), args, dy)


def mixer(B: int, T: int, backward: bool):
    H = HEADS["2.7B"]
    width, channels = H * HEADDIM, H * HEADDIM + 2 * STATE
    zxbcdt = torch.randn(B, T, width + channels + H, device="cuda").bfloat16().requires_grad_(backward)
    conv_weight, conv_bias = torch.randn(channels, 4, device="cuda"), torch.randn(channels, device="cuda")
    A, D, dt_bias = -torch.rand(H, device="cuda") - 0.5, torch.ones(H, device="cuda"), torch.zeros(H, device="cuda")
    parameters = conv_weight, conv_bias, dt_bias, A, D, torch.ones(width, device="cuda")
    dy = torch.randn(B, T, width, device="cuda").bfloat16()
    if not backward:
        return lambda: bitkernels.mamba2_mixer(zxbcdt, *parameters)
    return lambda: torch.autograd.grad(bitkernels.mamba2_mixer(zxbcdt, *parameters), zxbcdt, dy)


def linear(M: int, ternary: bool):
    N, K = LAYERS["2.7B in_proj"]
    x = torch.randn(M, K, device="cuda").bfloat16()
    if ternary:
        codes = bitkernels.pack_ternary(torch.randint(-1, 2, (N, K), device="cuda", dtype=torch.int8))
        scale = torch.ones(1, device="cuda")
        return lambda: bitkernels.ternary_linear(x, codes, scale, act_bits=8)
    codes = bitkernels.pack_sign(torch.randn(N, K, device="cuda"))
    alpha, beta = torch.rand(2, K, device="cuda")
    return lambda: bitkernels.packed_linear(x, codes, alpha, beta)


def seconds(case: str) -> list[float]:
    """Of the first call, and of those of further shapes. Runs in a process of its own."""
    leaf = torch.ones(1, device="cuda", requires_grad=True)
    torch.autograd.grad(leaf * 2, leaf, torch.ones_like(leaf))
    shapes = (1, 2048), (1, 4096), (2, 1000), (8, 2048)
    if case.startswith("ssd_scan"):
        calls = [scan(B, T, "gated" in case) for B, T in shapes]
    elif case.startswith("mamba2_mixer"):
        calls = [mixer(B, T, "backward" in case) for B, T in shapes]
    else:
        calls = [linear(M, "ternary" in case) for M in (1, 8, 32, 128, 1024)]
    took = []
    for call in calls:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
    return took


def run(case: str, cache: Path) -> list[float]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, case]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def test_first_call(case, device, benchmark, record, tmp_path):
    if device == "cpu":
        pytest.skip("nothing is compiled for a CPU")
    first, *further = benchmark.pedantic(run, (case, tmp_path), rounds=1)
    if case.startswith(("ssd_scan", "mamba2_mixer")):
        record(quantity(f"{case}, nothing in Triton's cache", "s", first))
        first, *further = run(case, tmp_path)
    record(quantity(f"{case}, a fresh process", "s", first))
    record(quantity(f"{case}, further shapes", "s", max(further)))


if __name__ == "__main__":
    print(json.dumps(seconds(sys.argv[1])))
