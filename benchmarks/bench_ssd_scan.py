"""The chunked scan, forward and forward with backward, against mamba_ssm on a GPU and the recurrence on a CPU."""

import peers
import pytest
import torch
from harness import HEADDIM, HEADS, STATE, Absent, Contender, device_of, nbytes, on_copies, verify, with_gradients

import bitkernels
from bitkernels import reference

CHUNK = 256  # the peer's default


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    sizes = [("780M", 1, 2048), ("2.7B", 1, 2048), ("2.7B", 8, 2048), ("2.7B", 1, 8192)] if cuda else [("780M", 1, 256)]
    metafunc.parametrize(("model", "B", "T"), sizes)


def recurrence(x, dt, A, B, C, *, D, dt_bias, dt_softplus):
    return reference.ssd_scan(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus)[0]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_ssd_scan(model, B, T, backward, device, compare):
    H = HEADS[model]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def tensor(*shape, to=dtype):
        return torch.randn(*shape, device=device).to(to).requires_grad_(backward)

    x, b, c = tensor(B, T, H, HEADDIM), tensor(B, T, 1, STATE), tensor(B, T, 1, STATE)
    dt, D = tensor(B, T, H), tensor(H, to=torch.float32)
    A = (-torch.rand(H, device=device) - 0.5).requires_grad_(backward)
    bias = (torch.rand(H, device=device) - 4).requires_grad_(backward)
    keywords = {"D": D, "dt_bias": bias, "dt_softplus": True}
    y = bitkernels.ssd_scan(x, dt, A, b, c, **keywords)
    part = slice(0, 128)  # the recurrence is sequential: the beginning of one sequence, and its causality, suffice
    first = [t[:1, part].double() for t in (x, dt, b, c)]
    wide = {"D": D.double(), "dt_bias": bias.double(), "dt_softplus": True}
    verify(y[:1, part], recurrence(first[0], first[1], A.double(), first[2], first[3], **wide))

    # Bytes: x, dt, B and C once, y once; the backward reads them and dy again and writes their gradients.
    size = nbytes(x, dt, b, c, y) + (nbytes(x, dt, b, c, y) + nbytes(x, dt, b, c) if backward else 0)
    # Per token and head: C B^T and its product with x over half a chunk on average, states in and out.
    flops = B * T * H * HEADDIM * (CHUNK + 4 * STATE) + B * T * CHUNK * STATE
    wrap = with_gradients if backward else lambda f: f
    ours = Contender("bitkernels", on_copies(wrap(bitkernels.ssd_scan), x, dt, A, b, c, **keywords), size)
    mamba = peers.mamba_ssm("ssd_combined", device)
    if isinstance(mamba, str):
        others = [Absent("mamba_ssm", mamba)]
    else:
        scan = mamba.mamba_chunk_scan_combined
        others = [Contender("mamba_ssm", on_copies(wrap(scan), x, dt, A, b, c, CHUNK, **keywords), size)]
    if device == "cpu" and not backward:  # autograd of the recurrence takes seconds
        others.append(Contender("recurrence", on_copies(recurrence, x, dt, A, b, c, **keywords), size))
    name = f"{model}, B={B}, T={T}, {'forward+backward' if backward else 'forward'}"
    compare(name, ours, others, flops * (3 if backward else 1), shape=[B, T, H, HEADDIM, STATE], dtype=str(dtype),
            headline=(model, T) == ("2.7B", 2048) or device == "cpu")  # fmt: skip
