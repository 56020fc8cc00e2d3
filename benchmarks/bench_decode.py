"""A decode step of whole models, as a CUDA graph: packed against mamba_ssm's bf16 model, both of random weights."""

import mamba_ssm_model
import pytest
import torch
from harness import Absent, Contender, device_of, nbytes
from mamba_ssm_model import MambaSSM

from bitkernels.inference.bench import random_model
from bitkernels.models import CONFIGS
from bitkernels.models.bimamba import Slots

STATES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    # On a CPU bench_generate.py times a step.
    metafunc.parametrize("size", ["780M", "1.3B", "2.7B"] if cuda else [], scope="module")
    metafunc.parametrize("B", [1, 8, 128])


@pytest.fixture(scope="module")
def models(size):
    config = CONFIGS[size.lower()]
    missing = mamba_ssm_model.missing("cuda")
    yield random_model(config, torch.device("cuda"), torch.bfloat16), missing or MambaSSM(config, "cuda")
    torch.cuda.empty_cache()


@torch.no_grad()
def test_decode(size, B, models, compare):
    model, peer = models
    ids = torch.arange(B, device="cuda")
    weights = nbytes(*model.parameters(), *model.buffers())

    def ours(state: str) -> Contender:
        cache = model.new_cache(B, STATES[state], padding=True)
        # As the engine: 16-bit states are rounded stochastically.
        slots = Slots(ids, *((ids * 7, ids + 100) if state == "bf16" else ()))
        assert model.step(ids, cache, slots).isfinite().all()
        # Bytes: every weight once, the states read and written.
        return Contender(f"{state} state", lambda: lambda: model.step(ids, cache, slots), weights + 2 * cache.nbytes)

    def theirs(state: str) -> Contender | Absent:
        name = f"mamba_ssm, {state} state"
        if isinstance(peer, str):
            return Absent(name, peer)
        states = peer.new_states(B, STATES[state])
        assert peer.step(ids, states).isfinite().all()
        moved = 2 * sum(nbytes(*pair) for pair in states)
        return Contender(name, lambda: lambda: peer.step(ids, states), peer.nbytes + moved)

    row = compare(
        f"{size}, B={B}, fp32 state", ours("fp32"), [ours("bf16"), theirs("fp32"), theirs("bf16")], 0.0, rounds=10,
        shape=[B], dtype="torch.bfloat16", headline=True,
    )  # fmt: skip
    row["tokens/s"] = round(1e6 * B / row["us"], 1)
