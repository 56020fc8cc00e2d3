"""From the start of a process to its first token: a packed checkpoint of random weights in the page cache.

Python finds every module compiled, as installers leave them: the first run, which is not timed, writes what is missing.
"""

import json
import os
import subprocess
import sys

import torch
from harness import Contender

from bitkernels.checkpoint import save_checkpoint
from bitkernels.inference.bench import random_model
from bitkernels.models import CONFIGS

CODE = """
import json, sys
import torch
path, device = sys.argv[1:]
if path:
    from bitkernels.checkpoint import load_checkpoint

    next(load_checkpoint(path, device, torch.bfloat16).model.stream([[1, 2, 3]], max_new_tokens=8, temperature=0))
# Not from getrusage, which begins with what the process had that started this one.
resident = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
allocated = torch.cuda.max_memory_allocated() if path and device == "cuda" else 0
print(json.dumps({"resident": resident, "allocated": allocated}))
"""


def pytest_generate_tests(metafunc):
    metafunc.parametrize("int8_embedding", [False, True], ids=["bf16 head", "int8 head"])
    metafunc.parametrize("size", ["780M", "2.7B"])


def run(path, device, modules) -> dict:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(modules)}
    command = [sys.executable, "-c", CODE, str(path), device]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def test_start(size, int8_embedding, device, tmp_path, compare):
    path = tmp_path / "model.safetensors"
    model = random_model(CONFIGS[size.lower()], torch.device("cpu"), torch.bfloat16)
    save_checkpoint(path, model.round_embedding_() if int8_embedding else model)
    del model
    modules = tmp_path / "modules"
    took, bare = run(path, device, modules), run("", device, modules)
    ours = Contender("bitkernels", lambda: lambda: run(path, device, modules), path.stat().st_size, wall=True)
    peer = Contender("import torch", lambda: lambda: run("", device, modules), 1, wall=True)
    row = compare(
        f"{size}, {'int8' if int8_embedding else 'bf16'} head", ours, [peer], 0.0, rounds=3, shape=[1],
        dtype="torch.bfloat16",
    )  # fmt: skip
    row["resident, MB"] = round(took["resident"] / 1e6, 1)
    row["with torch alone, MB"] = round(bare["resident"] / 1e6, 1)
    if device == "cuda":
        row["allocated, MB"] = round(took["allocated"] / 1e6, 1)
