"""The chunked scan, forward and forward with backward, against mamba_ssm on a GPU and the recurrence on a CPU."""

from typing import NamedTuple

import peers
import pytest
import torch
from harness import (
    HEADDIM,
    HEADS,
    STATE,
    Absent,
    Contender,
    device_of,
    nbytes,
    on_copies,
    peak_megabytes,
    verify,
    with_gradients,
)

import bitkernels
from bitkernels import reference

CHUNK = 256  # the peer's default


class Case(NamedTuple):
    model: str
    B: int
    T: int
    G: int = 1
    N: int = STATE

    def __str__(self):
        groups, state = f", G={self.G}" * (self.G > 1), f", N={self.N}" * (self.N != STATE)
        return f"{self.model}, B={self.B}, T={self.T}{groups}{state}"


HEADLINES = [Case("2.7B", B, T) for B, T in ((1, 2048), (8, 2048), (1, 8192), (1, 65536))]
# The curve that plot.py draws.
LENGTHS = [2**n for n in range(9, 18)]
GPU_CASES = [
    *HEADLINES,
    *(case for T in LENGTHS if (case := Case("2.7B", 1, T)) not in HEADLINES),
    *(Case("780M", B, T) for B, T in ((1, 2048), (8, 2048), (1, 8192), (1, 65536))),
    Case("2.7B", 1, 2048, G=8),
    Case("2.7B", 1, 2048, N=64),
]


def pytest_generate_tests(metafunc):
    cases = GPU_CASES if device_of(metafunc.config) == "cuda" else [Case("780M", 1, 256)]
    metafunc.parametrize("case", cases, ids=str)


def recurrence(x, dt, A, B, C, *, D, dt_bias, dt_softplus):
    return reference.ssd_scan(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus)[0]


def inputs(case: Case, device: str, backward: bool) -> tuple[tuple, dict]:
    """The arguments that ours and the peer share: those before the chunk, and the keywords."""
    B, T, H = case.B, case.T, HEADS[case.model]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def tensor(*shape, to=dtype):
        return torch.randn(*shape, device=device).to(to).requires_grad_(backward)

    x, b, c = tensor(B, T, H, HEADDIM), tensor(B, T, case.G, case.N), tensor(B, T, case.G, case.N)
    dt, D = tensor(B, T, H), tensor(H, to=torch.float32)
    A = (-torch.rand(H, device=device) - 0.5).requires_grad_(backward)
    bias = (torch.rand(H, device=device) - 4).requires_grad_(backward)
    return (x, dt, A, b, c), {"D": D, "dt_bias": bias, "dt_softplus": True}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_ssd_scan(case, backward, device, peer_cases, compare):
    B, T, H, N = case.B, case.T, HEADS[case.model], case.N
    (x, dt, A, b, c), keywords = inputs(case, device, backward)
    y = bitkernels.ssd_scan(x, dt, A, b, c, **keywords)
    part = slice(0, 128)  # the recurrence is sequential: the beginning of one sequence, and its causality, suffice
    first = [t[:1, part].double() for t in (x, dt, b, c)]
    wide = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in keywords.items()}
    verify(y[:1, part], recurrence(first[0], first[1], A.double(), first[2], first[3], **wide))

    # Bytes: x, dt, B and C once, y once; the backward reads them and dy again and writes their gradients.
    size = nbytes(x, dt, b, c, y) + (nbytes(x, dt, b, c, y) + nbytes(x, dt, b, c) if backward else 0)
    # Per token and head: C B^T and its product with x over half a chunk on average, states in and out.
    flops = B * T * H * HEADDIM * (CHUNK + 4 * N) + B * T * CHUNK * N
    wrap = with_gradients if backward else lambda f: f
    calls = {"bitkernels": on_copies(wrap(bitkernels.ssd_scan), x, dt, A, b, c, **keywords)}
    mamba = peers.mamba_scan(device, peer_cases in str(case))
    if isinstance(mamba, str):
        others = [Absent("mamba_ssm", mamba)]
    else:
        calls["mamba_ssm"] = on_copies(wrap(mamba), x, dt, A, b, c, CHUNK, **keywords)
        others = [Contender("mamba_ssm", calls["mamba_ssm"], size)]
    memory = {f"{name}, MB": peak_megabytes(make()) for name, make in calls.items()} if device == "cuda" else {}
    if device == "cpu" and not backward:  # autograd of the recurrence takes seconds
        others.append(Contender("recurrence", on_copies(recurrence, x, dt, A, b, c, **keywords), size))
    name = f"{case}, {'forward+backward' if backward else 'forward'}"
    compare(
        name, Contender("bitkernels", calls["bitkernels"], size), others, flops * (3 if backward else 1),
        shape=[B, T, H, HEADDIM, N], dtype=str(x.dtype), headline=case in HEADLINES or device == "cpu", **memory,
    )  # fmt: skip
