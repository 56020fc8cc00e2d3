"""Tokens a second of the 780M training step, fully binarised, on one GPU and on all that torchrun starts processes for.

    torchrun --nproc-per-node 2 benchmarks/training_scaling.py OUT.json

8 x 2048 tokens a GPU: sharded (FSDP2, sign bits on the wire), also with the step captured, and replicated with the step
captured. The losses are of one global batch for all. Every process first trains alone, on its own GPU. Without a GPU a
tiny model shows the steps.
"""

import gc
import json
import os
import sys
import time

import torch

from bitkernels.models import CONFIGS, BiMambaForCausalLM
from bitkernels.training import TrainConfig, train
from bitkernels.training.distributed import processes, rank, world_size

STEPS, WARM = 10, 4
CUDA = torch.cuda.is_available()
SIZE, BATCH, LENGTH = ("780m", 8, 2048) if CUDA else ("tiny", 2, 64)


def run(device: torch.device, batch: int, **options) -> dict:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config = CONFIGS[SIZE]
    with device:
        model = BiMambaForCausalLM(config)
    # Text that can be learned: each token leads to one of a few.
    generator = torch.Generator().manual_seed(0)
    count = 2 * STEPS * BATCH * 8 * LENGTH
    tokens = (torch.arange(count) * 7 + torch.randint(4, (count,), generator=generator)) % config.vocab_size
    losses, times = [], []

    def on_step(step) -> None:
        losses.append(step.loss)
        if step.done in (WARM, STEPS):
            float(step.loss)
            times.append(time.perf_counter())

    plan = TrainConfig(STEPS, batch, LENGTH, lr=2.5e-4, autocast=torch.bfloat16, **options)
    train(model, tokens, plan, on_step=on_step)
    seconds = (times[1] - times[0]) / (STEPS - WARM)
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    return {
        "tokens/s": round(batch * LENGTH / seconds), "ms": round(1e3 * seconds, 2), "peak GiB": round(peak, 2),
        "losses": [round(float(loss), 6) for loss in losses],
    }  # fmt: skip


def main(out: str, expected: int) -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    captured = {"capture": CUDA}
    rows = {
        "one": run(device, BATCH),
        "one, captured": run(device, BATCH, **captured),
        "one, the global batch in parts": run(device, BATCH * expected, accumulation=expected),
    }
    with processes(torch.device("cuda" if CUDA else "cpu")) as device:
        assert world_size() == expected
        rows[f"{expected}, sharded"] = run(device, BATCH * expected)
        rows[f"{expected}, sharded, captured"] = run(device, BATCH * expected, **captured)
        rows[f"{expected}, replicated, captured"] = run(device, BATCH * expected, replicate=True, **captured)
        if rank() == 0:
            machine = torch.cuda.get_device_name() if CUDA else "CPU"
            with open(out, "w") as file:
                json.dump({"machine": machine, "torch": torch.__version__, "model": SIZE, "rows": rows}, file, indent=1)
            reference = torch.tensor(rows["one, the global batch in parts"]["losses"])
            for name, row in rows.items():
                base = rows["one, captured" if "captured" in name else "one"]["tokens/s"]
                same = ""
                if row["losses"] and name != "one" and name != "one, captured":
                    off = ((torch.tensor(row["losses"]) - reference).abs() / reference).max()
                    same = f", losses off by {float(off):.1e}"
                print(f"{name}: {row['tokens/s']:,} tokens/s, {row['tokens/s'] / base:.2f}x, {row['ms']} ms, "
                      f"{row['peak GiB']} GiB{same}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(os.environ["WORLD_SIZE"]))
