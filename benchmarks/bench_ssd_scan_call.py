"""What calling the scan costs: the processor's time of a forward call, and the backward by the wall clock.

A model calls the scan layer after layer, so forward calls are timed in runs of ten, ours and the peer's alike: each by
itself, on inputs of its own, while the GPU is at work on those before it. The launches of a run fit the GPU's queue.
"""

import contextlib

import peers
import pytest
import torch
from bench_ssd_scan import CHUNK, Case, inputs
from harness import Absent, Contender, on_copies

import bitkernels

ROUNDS, RUN = 100, 10


def pytest_generate_tests(metafunc):
    metafunc.parametrize("what", ["forward without gradients", "forward", "backward"])


def backward_call(y: torch.Tensor, leaves: list[torch.Tensor]):
    """The backward of a graph made once, until the GPU is done."""
    dy = torch.randn_like(y)

    def call():
        torch.autograd.grad(y, leaves, dy, retain_graph=True)
        torch.cuda.synchronize()

    return call


def test_call(what, device, peer_cases, compare):
    if device == "cpu":
        pytest.skip("there, a call is its work")
    case = Case("2.7B", 1, 2048)
    args, keywords = inputs(case, device, True)
    leaves = [t for t in (*args, *keywords.values()) if isinstance(t, torch.Tensor)]

    def contender(name, scan, *more):
        if what == "backward":
            return Contender(name, lambda: backward_call(scan(*args, *more, **keywords), leaves), 0, wall=True)
        return Contender(name, on_copies(scan, *args, *more, **keywords), 0, wall=True, copies=RUN)

    mamba = peers.mamba_scan(device, peer_cases in str(case))
    other = Absent("mamba_ssm", mamba) if isinstance(mamba, str) else contender("mamba_ssm", mamba, CHUNK)
    name = f"{case}, {what}, {'wall clock' if what == 'backward' else 'CPU time'}"
    with torch.no_grad() if "without" in what else contextlib.nullcontext():
        compare(name, contender("bitkernels", bitkernels.ssd_scan), [other], 0.0, rounds=ROUNDS)
