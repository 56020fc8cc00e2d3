"""Two processes train as one does, go on with its checkpoints and it with theirs, and send each other signs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_train import CAPTURED, CONFIG, LAYERS, MODELS, RUNS, run, tiny, trained_twice
from torch import nn

from bitkernels import pack_sign
from bitkernels.nn import FBILinear
from bitkernels.training import Checkpoints, TrainConfig
from bitkernels.training.sign_gather import GatheredSigns

TESTS = Path(__file__).parent
# Relative, of losses and norms: sums are taken in another order, in float32, and in bfloat16's activations; int8
# rounding of ternary layers turns the last bit of a sum into one step of 1/127 now and then.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "shared layers": 1e-5, "ternary": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of two processes, that found a checkpoint of one in "one" and left theirs in "two"."""
    folder = tmp_path_factory.mktemp("distributed")
    run(CONFIG, Checkpoints(folder / "one", every=3), stop=3)
    two_processes(folder)
    return folder


def two_processes(folder, *arguments):
    """What they leave in ``folder``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    script = [str(TESTS / "distributed_train.py"), str(folder), *arguments]
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    if torch.cuda.device_count() < 2:
        pytest.skip("no two CUDA devices are visible")
    return two_processes(tmp_path_factory.mktemp("captured"), "cuda")


@pytest.fixture(scope="module")
def alone():
    return {name: run(config)[1] for name, config in RUNS.items() if name in ("signs", "bfloat16")}


def assert_same(curve, expected, steps, tolerance):
    assert list(map(int, curve)) == steps
    for step, values in curve.items():
        assert values == pytest.approx(expected[int(step)], rel=tolerance), f"step {step}"


@pytest.mark.parametrize("name", RUNS)
def test_loss_curve_equals_one_processs(name, results, alone):
    dtype = "bfloat16" if RUNS[name].autocast else "float32"
    expected = alone["bfloat16" if dtype == "bfloat16" else "signs"]
    assert_same(results["curves"][name], expected, [1, 2, 3, 4, 5, 6], TOLERANCE[dtype])


@pytest.mark.parametrize("name", MODELS)
def test_models_of_all_kinds(name, results):
    _, expected = run(CONFIG, **MODELS[name])
    assert_same(results["curves"][name], expected, [1, 2, 3, 4, 5, 6], TOLERANCE[name])


def test_a_stopped_run_of_two_repeats_the_unbroken_one(results):
    assert results["stopped"] == results["curves"]["signs"]


def test_a_replicated_run_goes_on_sharded(results, alone):
    assert_same(results["replicated, then sharded"], alone["signs"], [1, 2, 3, 4, 5, 6], TOLERANCE["float32"])


def test_two_go_on_where_one_stopped(results, alone):
    assert_same(results["ended by two"], alone["signs"], [4, 5, 6], TOLERANCE["float32"])


def test_one_goes_on_where_two_stopped(folder, results, alone):
    assert_same(results["begun by two"], alone["signs"], [1, 2, 3], TOLERANCE["float32"])
    _, rest = run(CONFIG, Checkpoints(folder / "two", every=3))
    assert_same(rest, alone["signs"], [4, 5, 6], TOLERANCE["float32"])


def test_the_whole_model_is_the_sharded_one(results):
    assert results["plain parameters"]
    assert results["whole model"] == pytest.approx(results["perplexity"], rel=1e-6)


def test_gathered_signs_stand_for_a_weight():
    layer, x = FBILinear(40, 6), torch.randn(3, 40, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in layer.parameters())]
    layer.weight = nn.Parameter(GatheredSigns(pack_sign(layer.weight), 40, torch.float32))
    x.grad = None
    layer.zero_grad()
    layer(x).square().sum().backward()
    for ours, theirs in zip([x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="add.Tensor of a gathered weight"):
        layer.weight + 1
    with pytest.raises(NotImplementedError, match="sign bits alone"):
        layer.weight.as_strided((40, 6), (1, 40))


@pytest.mark.parametrize("layer", LAYERS)
def test_signs_are_a_tenth_of_bfloat16(layer, results):
    N, K = LAYERS[layer]
    whole = 2 * N * K // 2  # bytes of half the rows
    # A row of alpha and one of beta are padded to one a process.
    assert results["bytes"][layer] == N * K // 8 // 2 + 2 * 4 * K
    assert whole >= 10 * results["bytes"][layer]


def test_blocks_of_signs_are_gathered_once_a_step(results):
    blocks = len(tiny().layers)
    assert results["gathers"] == {"signs": blocks + 1, "whole weights": 2 * blocks + 1}


def test_evaluations_between_steps_change_nothing(results):
    looked_at = results["looked at"]
    assert {step: values[:2] for step, values in looked_at.items()} == results["curves"]["signs"]
    assert len({held_out for _, _, held_out in looked_at.values()}) == len(looked_at)
    assert looked_at["6"][2] == pytest.approx(results["perplexity"], rel=1e-5)


def test_an_evaluation_between_runs_changes_nothing(results):
    """The second optimiser must find the shards, not what the evaluation gathered: as one process, which has none."""
    blind, looked_at = results["trained twice"]
    assert looked_at == blind
    assert blind == pytest.approx(trained_twice(look=True), rel=TOLERANCE["float32"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CAPTURED)
def test_captured_steps_of_two_have_the_same_bits(name, pairs):
    """And held-out perplexities between them, for which nothing may be kept from before a step."""
    expected, captured = pairs[name]
    assert captured == expected


def test_rows_that_cannot_be_shared_out_evenly(results):
    assert results["uneven"] == ["weight"]


def test_a_batch_that_cannot_be_shared_out():
    with pytest.raises(ValueError, match="batch_size 6 must be a multiple of processes times accumulation, 2 x 2"):
        TrainConfig(steps=1, batch_size=6, accumulation=2).part_size(2)
