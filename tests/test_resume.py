"""A run that is killed goes on to the bits of an unbroken one."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitkernels.models import CONFIGS, BiMambaForCausalLM
from bitkernels.training import Checkpoints, TrainConfig, train
from bitkernels.training.metrics import Metrics

ROOT = Path(__file__).parent.parent
CONFIG = TrainConfig(steps=6, batch_size=2, length=16, lr=5e-3, weight_decay=0.1)
TOKENS = torch.randint(300, (2000,), generator=torch.Generator().manual_seed(0))

# Trains in a process of its own, which is killed; argument: the folder of the run.
SCRIPT = """
import io, sys, torch
from rich.console import Console
from bitkernels.models import CONFIGS, BiMambaForCausalLM
from bitkernels.training import TrainConfig
from bitkernels.training.run import Corpus, fit
torch.manual_seed(1)
model = BiMambaForCausalLM(CONFIGS["tiny"].replace(vocab_size=300, d_model=32, n_layer=1))
tokens = torch.randint(300, (4000,))
config = TrainConfig(steps=60, batch_size=2, length=16, lr=5e-3)
corpus = Corpus(tokens, tokens[:65], None)
fit(model, corpus, config, Console(file=io.StringIO()), "Run", run=sys.argv[1], checkpoint_every=3, log_every=1)
"""


def tiny():
    torch.manual_seed(0)
    return BiMambaForCausalLM(CONFIGS["tiny"].replace(vocab_size=300, d_model=32, n_layer=1))


def run(config, model, checkpoints=None, stop=None):
    """The losses by step; stops as a killed process does, in the middle of a step's report."""
    losses = {}

    def on_step(step):
        losses[step.done] = float(step.loss)
        if step.done == stop:
            raise KeyboardInterrupt

    if stop is None:
        train(model, TOKENS, config, on_step=on_step, checkpoints=checkpoints)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(model, TOKENS, config, on_step=on_step, checkpoints=checkpoints)
    return losses


def start(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env=environment)


def curve(folder):
    return [(row["step"], row["loss"]) for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def test_a_killed_run_repeats_the_unbroken_one(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    reference = start(unbroken)
    # Killed twice, whatever it was at: it writes a checkpoint every third step, which takes longer than steps do.
    for lines in (5, 24):
        process = start(broken)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (broken / "metrics.jsonl").exists() and len(curve_lines(broken)) >= lines:
                break
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(broken).wait() == 0
    assert reference.wait() == 0
    assert [step for step, _ in curve(unbroken)] == list(range(1, 61))
    assert curve(broken) == curve(unbroken)


def curve_lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_weights_and_losses_after_a_stop(tmp_path):
    config = CONFIG
    expected_model = tiny()
    expected = run(config, expected_model)
    model, checkpoints = tiny(), Checkpoints(tmp_path, every=2)
    first = run(config, model, checkpoints, stop=5)
    assert checkpoints.steps() == [2, 4]
    rest = run(config, fresh := tiny(), checkpoints)
    assert list(rest) == [5, 6]
    assert first | rest == expected
    assert checkpoints.steps() == [4, 6]
    assert all(torch.equal(a, b) for a, b in zip(expected_model.parameters(), fresh.parameters(), strict=True))
    assert run(config, tiny(), checkpoints) == {}


def test_a_checkpoint_that_was_being_written(tmp_path, monkeypatch):
    """Killed at the rename, the last whole checkpoint counts, and the next run takes the rest away."""
    config, checkpoints = CONFIG, Checkpoints(tmp_path, every=2, keep=1)

    def rename(source, target):
        if Path(target).name == "step-00000004":
            raise KeyboardInterrupt
        os.replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("bitkernels.training.checkpoints.os.rename", rename)
        with pytest.raises(KeyboardInterrupt):
            run(config, tiny(), checkpoints)
    assert checkpoints.steps() == [2]
    assert (tmp_path / ".step-00000004").is_dir()
    assert run(config, tiny(), checkpoints)[6] == run(config, tiny())[6]
    assert checkpoints.steps() == [6]
    assert not list(tmp_path.glob(".step*"))


def test_computed_in_another_way(tmp_path):
    """A run may go on with other parts and with recomputation; sums are then taken in another order."""
    expected = run(CONFIG, tiny())
    run(CONFIG, tiny(), Checkpoints(tmp_path, every=2), stop=3)
    rest = run(replace(CONFIG, accumulation=2, recompute=True), tiny(), Checkpoints(tmp_path, every=2))
    assert rest == pytest.approx({step: expected[step] for step in (3, 4, 5, 6)}, rel=1e-5)


def test_another_run(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=2)
    run(CONFIG, tiny(), checkpoints, stop=3)
    with pytest.raises(ValueError, match="of another run: lr was 0.005 and is 0.001"):
        run(replace(CONFIG, lr=1e-3), tiny(), checkpoints)
    with pytest.raises(ValueError, match=r"of another run: text was \d+ and is \d+"):
        train(tiny(), TOKENS.flip(0), CONFIG, checkpoints=checkpoints)
    with pytest.raises(ValueError, match="at least 1, got 0 and 2"):
        Checkpoints(tmp_path, every=0)


def test_metrics_tell_of_every_step_once(tmp_path):
    metrics = Metrics(tmp_path)
    for step in (1, 2, 3):
        metrics.report(step, loss=step / 3)
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 2, "los')
    metrics = Metrics(tmp_path, done=2)
    metrics.report(3, loss=0.5)
    metrics.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 3, "loss": 0.5}]


def test_tensorboard_reads_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path)
    for step in (1, 2):
        metrics.report(step, loss=step / 2)
    metrics.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]
