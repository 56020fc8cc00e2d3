"""How far the scan and every gradient of it are from the float64 recurrence, beside mamba_ssm on the same inputs.

Inputs as a trained model has them (step sizes of 1e-3 to 0.1, one in twenty up to 10, A of -16 to -1), and at random.
A gate, and few heads, take the scan to other kernels. Errors are those of several draws, pooled.
"""

from typing import NamedTuple

import peers
import torch
from bench_ssd_scan import CHUNK
from harness import HEADDIM, HEADS, STATE, device_of, quantity, rms_error
from torch import Tensor

import bitkernels
from bitkernels import reference

# Of all draws together: a head has one value of dA, ddt_bias and dD each.
DRAWN_HEADS = {"cuda": 240, "cpu": 4}
# Autograd of the recurrence holds several states a token.
TIME = {"cuda": 1024, "cpu": 128}


class Case(NamedTuple):
    trained: bool
    gated: bool = False
    heads: int = HEADS["2.7B"]

    def __str__(self):
        few = f", {self.heads} heads" * (self.heads != HEADS["2.7B"])
        return f"{'as trained' if self.trained else 'at random'}{', gated' * self.gated}{few}"


CASES = {
    "cuda": [*(Case(trained, gated) for trained in (True, False) for gated in (False, True)), Case(True, True, 20)],
    "cpu": [Case(True, True, 4)],
}


def pytest_generate_tests(metafunc):
    metafunc.parametrize("case", CASES[device_of(metafunc.config)], ids=str)


def draw(case: Case, device: str) -> dict[str, Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    time, heads = TIME[device], case.heads

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(to)

    if case.trained:
        step = 10 ** (2 * torch.rand(1, time, heads, device=device) - 3)
        step = torch.where(torch.rand_like(step) < 0.05, 10 * torch.rand_like(step), step)
        A, bias = -1 - 15 * torch.rand(heads, device=device), normal(heads, to=torch.float32)
        dt = (step.double().expm1().log() - bias).to(dtype)
    else:
        A, bias = -0.5 - torch.rand(heads, device=device), torch.rand(heads, device=device) - 4
        dt = normal(1, time, heads)
    named = {
        "x": normal(1, time, heads, HEADDIM), "dt": dt, "A": A, "B": normal(1, time, 1, STATE),
        "C": normal(1, time, 1, STATE), "D": normal(heads, to=torch.float32), "dt_bias": bias,
        "initial_states": normal(1, heads, HEADDIM, STATE, to=torch.float32),
    }  # fmt: skip
    return named | {"z": normal(1, time, heads, HEADDIM)} if case.gated else named


def everything(scan, named: dict[str, Tensor], output_gradients: list[Tensor], dtype=None, **options) -> dict:
    """y, the final states and the gradient of every argument."""
    leaves = {name: t.to(dtype or t.dtype, copy=True).requires_grad_() for name, t in named.items()}
    outputs = scan(**leaves, dt_softplus=True, **options)
    given = [g.to(out.dtype) for g, out in zip(output_gradients, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), given)
    named_gradients = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": outputs[0].detach(), "final_states": outputs[1].detach(), **named_gradients}


def pooled_errors(scans: dict[str, tuple], case: Case, device: str) -> dict[str, dict[str, float]]:
    """By scan, then by what it is of."""
    squares: dict[str, dict[str, list[float]]] = {name: {} for name in scans}
    draws = DRAWN_HEADS[device] // case.heads
    for _ in range(draws):
        named = draw(case, device)
        gradients = [torch.randn_like(named["x"]), torch.randn_like(named["initial_states"])]
        exact = everything(reference.ssd_scan, named, gradients, torch.float64)
        for name, (scan, options) in scans.items():
            for what, out in everything(scan, named, gradients, **options).items():
                squares[name].setdefault(what, []).append(rms_error(out, exact[what]) ** 2)
    return {name: {what: (sum(each) / draws) ** 0.5 for what, each in of.items()} for name, of in squares.items()}


def test_accuracy(case, device, peer_cases, benchmark, record):
    mamba = peers.mamba_scan(device, peer_cases in str(case))
    scans = {"bitkernels": (bitkernels.ssd_scan, {"return_final_states": True})}
    if not isinstance(mamba, str):
        scans["mamba_ssm"] = mamba, {"return_final_states": True, "chunk_size": CHUNK}
    errors = benchmark.pedantic(pooled_errors, (scans, case, device), rounds=1)
    for what, error in errors["bitkernels"].items():
        theirs = errors["mamba_ssm"][what] if "mamba_ssm" in errors else mamba
        record(quantity(f"{case}: {what}", "error", error, {"mamba_ssm": theirs}))
