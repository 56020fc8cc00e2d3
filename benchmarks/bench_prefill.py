"""From a prompt to its first token in the engine, by the wall clock; a model of random packed weights.

The peer is mamba_ssm's bf16 model as one CUDA graph, that is, its kernels without what its host adds. What is allocated
is the most of a whole run, weights included: a million tokens take what those of one chunk take.
"""

import gc

import mamba_ssm_model
import pytest
import torch
from harness import Absent, Contender, device_of, nbytes
from mamba_ssm_model import MambaSSM

from bitkernels.inference import Engine, SamplingParams
from bitkernels.inference.bench import random_model
from bitkernels.models import CONFIGS

CHUNK = {"cuda": 16384, "cpu": 512}
LONGEST = 10**6
ALONE = [("780M", 1, T) for T in (CHUNK["cuda"], LONGEST)]  # without the peer, which reads a prompt at once
GPU_CASES = [("2.7B", 1, 2048), ("2.7B", 8, 2048), ("2.7B", 1, 65536), *ALONE]
CPU_CASES = [("780M", 1, 512), ("2.7B", 1, 512)]
FIRST = SamplingParams(max_new_tokens=1, temperature=0)


def pytest_generate_tests(metafunc):
    cases = GPU_CASES if device_of(metafunc.config) == "cuda" else CPU_CASES
    metafunc.parametrize("size,B,T", cases, ids=lambda value: str(value))


@pytest.fixture(scope="module")
def model_of(request):
    models = {}

    def get(size, device):
        if size not in models:
            models.clear()
            models[size] = random_model(CONFIGS[size.lower()], torch.device(device), torch.bfloat16)
        return models[size]

    return get


def test_prefill(size, B, T, device, model_of, peer_cases, compare):
    model = model_of(size, device)
    engine = Engine(model, max_batch=B, prefill_chunk=CHUNK[device])
    ids = torch.randint(model.config.vocab_size, (B, T))

    def ours():
        requests = [engine.submit(prompt, FIRST) for prompt in ids]
        while not engine.idle:
            engine.step()
        assert all(len(request.tokens) == 1 for request in requests)

    if device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    ours()  # compiles
    memory = {"allocated, MB": round(torch.cuda.max_memory_allocated() / 1e6, 1)} if device == "cuda" else {}
    missing, case, name = mamba_ssm_model.missing(device), f"{size}, {B}x{T}", "mamba_ssm, kernels alone"
    if missing is None and (size, B, T) in ALONE:
        missing = "not timed for such a prompt, which it reads at once"
    if missing is None and peer_cases not in case:
        missing = f"not timed in this run, which tunes it for {peer_cases} only"
    if missing is None:
        peer, theirs = MambaSSM(model.config, device), ids.to(device)
        other = Contender(name, lambda: lambda: peer.prefill(theirs), peer.nbytes, copies=1)
    else:
        other = Absent(name, missing)
    # Bytes: the weights once. FLOPs: two for each weight of the projections and each token.
    weights = nbytes(*model.parameters(), *model.buffers())
    c = model.config
    flops = 2 * B * T * c.n_layer * (c.d_model * c.d_in_proj + c.d_inner * c.d_model)
    row = compare(
        case, Contender("bitkernels", lambda: ours, weights, wall=True), [other], flops, headline=True,
        rounds=1 if T == LONGEST else 5, shape=[B, T], dtype="torch.bfloat16", **memory,
    )  # fmt: skip
    row["tokens/s"] = round(1e6 * B * T / row["us"], 1)
