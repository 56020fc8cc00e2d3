"""One token of the scan against mamba_ssm on a GPU and plain PyTorch on a CPU."""

import peers
import torch
from harness import HEADDIM, HEADS, STATE, Absent, Contender, device_of, nbytes, on_copies, verify

import bitkernels
from bitkernels import reference


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("model", HEADS)
    metafunc.parametrize("B", [1, 8, 128] if cuda else [1, 8])
    metafunc.parametrize("rounding", [None, "nearest", "stochastic"])  # of a bf16 state; None: float32


def test_ssd_step(model, B, rounding, device, compare):
    H = HEADS[model]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    wide_state = torch.randn(B, H, HEADDIM, STATE, device=device)
    state = wide_state.bfloat16() if rounding else wide_state
    given = {}
    if rounding == "stochastic":
        given = {name: torch.arange(B, device=device) for name in ("seed", "position")}
    x, dt = torch.randn(B, H, HEADDIM, device=device).to(dtype), torch.randn(B, H, device=device).to(dtype)
    b, c = (torch.randn(B, 1, STATE, device=device).to(dtype) for _ in range(2))
    A, D, bias = -torch.rand(H, device=device) - 0.5, torch.randn(H, device=device), torch.rand(H, device=device) - 4
    y = bitkernels.ssd_step(state.clone(), x, dt, A, b, c, D=D, dt_bias=bias, dt_softplus=True, **given)
    wide = [t.double() for t in (state, x, dt, A, b, c)]
    verify(y, reference.ssd_step(*wide, D=D.double(), dt_bias=bias.double(), dt_softplus=True))

    # Bytes: the state read and written, everything else once.
    size = 2 * nbytes(state) + nbytes(x, dt, b, c, y)
    keywords = {"D": D, "dt_bias": bias, "dt_softplus": True}
    ours = Contender("bitkernels", on_copies(bitkernels.ssd_step, state, x, dt, A, b, c, **keywords, **given), size)
    # The others keep a float32 state.
    others_size = 2 * nbytes(wide_state) + nbytes(x, dt, b, c, y)
    mamba = peers.mamba_ssm("selective_state_update", device)
    if isinstance(mamba, str):
        others = [Absent("mamba_ssm", mamba)]
    else:

        def update(state, x, dt, A, b, c, D, bias):
            # The peer takes what belongs to a head once per channel, as views that repeat it.
            return mamba.selective_state_update(
                state, x, dt[..., None].expand_as(x), A[:, None, None].expand(H, HEADDIM, STATE), b, c,
                D[:, None].expand(H, HEADDIM), dt_bias=bias[:, None].expand(H, HEADDIM), dt_softplus=True,
            )  # fmt: skip

        others = [Contender("mamba_ssm", on_copies(update, wide_state, x, dt, A, b, c, D, bias), others_size)]
    if device == "cpu":
        step = on_copies(reference.ssd_step, wide_state, x, dt, A, b, c, **keywords)
        others.append(Contender("PyTorch", step, others_size))
    flops = 6 * state.numel()
    name = f"{model}, B={B}{f', bf16 state, {rounding}' if rounding else ''}"
    compare(name, ours, others, flops, shape=[B, H, HEADDIM, STATE], dtype=str(dtype),
            headline=model == "2.7B")  # fmt: skip
