"""What test_distributed.py does in every process; under torchrun in two, and alone.

    torchrun --nproc-per-node 2 distributed_train.py FOLDER [cuda]

writes FOLDER/results.json: losses and gradient norms of runs, and what was gathered; with cuda, of runs on GPUs with
steps as they are and captured.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from bitkernels.data import Tokens
from bitkernels.models import CONFIGS, BiMambaForCausalLM
from bitkernels.nn import FBILinear
from bitkernels.training import Checkpoints, TrainConfig, perplexity, train
from bitkernels.training.distributed import processes, rank, whole_model, world_size
from bitkernels.training.sign_gather import LatentShard, gather_signs_

CONFIG = TrainConfig(steps=6, batch_size=8, length=16, lr=5e-3, weight_decay=0.1)
RUNS = {
    "signs": CONFIG,
    "whole weights": replace(CONFIG, signs_alone=False),
    "accumulated and recomputed": replace(CONFIG, accumulation=2, recompute=True),
    "replicated": replace(CONFIG, replicate=True),
    "replicated and accumulated": replace(CONFIG, replicate=True, accumulation=2),
    # At a small rate few signs flip, which a rounding of 16 bits can decide.
    "bfloat16": replace(CONFIG, autocast=torch.bfloat16, lr=5e-4),
}
# Models that runs of CONFIG train as well.
MODELS = {
    "shared layers": {"sharing": "universal"},
    "ternary": {"weight_format": "ternary", "ternary_embedding": True, "ternary_head": True, "tie_embeddings": False},
}
# Runs that are captured on GPUs, and changes of their models.
CAPTURED = {
    "signs": (RUNS["bfloat16"], {}),
    "whole weights": (replace(RUNS["bfloat16"], signs_alone=False), {}),
    "accumulated and recomputed": (replace(RUNS["bfloat16"], accumulation=2, recompute=True), {}),
    "replicated": (replace(RUNS["bfloat16"], replicate=True), {}),
    **{name: (RUNS["bfloat16"], changes) for name, changes in MODELS.items()},
}
# [N, K] of the projections of the 780M model.
LAYERS = {"in_proj": (6448, 1536), "out_proj": (1536, 3072)}

random = np.random.default_rng(0)
DATA = Tokens(random.integers(300, size=2000).astype(np.uint16), np.arange(0, 2000, 23))


HELD_OUT = torch.from_numpy(DATA.tokens[:129].astype(np.int64))


def tiny(**changes):
    torch.manual_seed(0)
    return BiMambaForCausalLM(CONFIGS["tiny"].replace(vocab_size=300, **changes))


def run(config, checkpoints=None, stop=None, look=False, device="cpu", **changes):
    """The trained model, and [loss, norm of the gradients] by step; ``stop`` ends the run after so many steps.

    With ``look`` also the held-out perplexity after each step, for which all weights are gathered.
    """
    model, curve = tiny(**changes).to(device), {}

    def on_step(step):
        curve[step.done] = [float(step.loss), float(step.grad_norm)]
        if look:
            curve[step.done].append(perplexity(model, HELD_OUT, 16))
        if stop is not None and step.done > stop:
            raise InterruptedError

    try:
        train(model, DATA, config, on_step=on_step, checkpoints=checkpoints)
    except InterruptedError:
        curve.pop(stop + 1)
    return model, curve


def trained_twice(look):
    """Losses of two runs of one model, between which it is looked at."""
    model, losses = tiny(), []
    for _ in range(2):
        train(model, DATA, replace(CONFIG, steps=3), on_step=lambda step: losses.append(float(step.loss)))
        if look:
            perplexity(model, HELD_OUT, 16)
            assert all(p.isfinite().all() for p in model.parameters())
    return losses


def gathered_bytes(N, K):
    """Bytes that a process sends for one all-gather of a binary layer: its signs and scales."""
    layer = FBILinear(K, N, bias=False)
    assert gather_signs_(layer, world_size()) == []
    fully_shard(layer, mesh=init_device_mesh("cpu", (world_size(),)))
    assert isinstance(layer.weight.to_local(), LatentShard)
    with Gathered() as gathered:
        layer(torch.ones(1, K))
    return gathered.bytes


def gathers(config):
    """All-gathers of one step."""
    with Gathered() as gathered:
        run(replace(config, steps=1))
    return gathered.count


class Gathered(TorchDispatchMode):
    """Counts all-gathers, and the bytes that this process puts into them."""

    count = bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d._allgather_base_.default:
            self.count += 1
            self.bytes += args[1].nbytes
        return function(*args, **(kwargs or {}))


def captured_pairs(device):
    """Runs on a GPU, as they are and with captured steps."""
    pairs = {}
    for name, (config, changes) in CAPTURED.items():
        configs = config, replace(config, capture=True)
        pairs[name] = [run(c, look=True, device=device, **changes)[1] for c in configs]
    return pairs


def main(folder):
    curves = {name: run(config)[1] for name, config in RUNS.items()}
    curves |= {name: run(CONFIG, **changes)[1] for name, changes in MODELS.items()}
    results = {"curves": curves}
    _, results["begun by two"] = run(CONFIG, Checkpoints(folder / "two", every=3), stop=3)
    stopped = Checkpoints(folder / "stopped", every=2)
    results["stopped"] = run(CONFIG, stopped, stop=4)[1] | run(CONFIG, stopped)[1]
    replicated = Checkpoints(folder / "replicated", every=2)
    results["replicated, then sharded"] = run(RUNS["replicated"], replicated, stop=4)[1] | run(CONFIG, replicated)[1]
    model, results["ended by two"] = run(CONFIG, Checkpoints(folder / "one", every=3))
    results["looked at"] = run(CONFIG, look=True)[1]
    results["trained twice"] = [trained_twice(look) for look in (False, True)]
    results["perplexity"] = perplexity(model, HELD_OUT, 16)
    whole = whole_model(model)
    results["whole model"] = perplexity(whole, HELD_OUT, 16)
    results["plain parameters"] = all(type(p) is nn.Parameter for p in whole.parameters())
    results["bytes"] = {name: gathered_bytes(*shape) for name, shape in LAYERS.items()}
    results["gathers"] = {name: gathers(RUNS[name]) for name in ("signs", "whole weights")}
    uneven = FBILinear(64, 101)
    results["uneven"] = gather_signs_(uneven, 2)
    return results


if __name__ == "__main__":
    folder, kind = Path(sys.argv[1]), torch.device(sys.argv[2] if len(sys.argv) > 2 else "cpu")
    with processes(kind) as device:
        results = main(folder) if kind.type == "cpu" else captured_pairs(device)
        if rank() == 0:
            (folder / "results.json").write_text(json.dumps(results))
