"""Requests of random lengths and settings join, leave, fail and are cancelled for a while; then they are checked.

python tests/soak.py --device cuda --seconds 300     # of the model that ships
"""

import argparse
import faulthandler
import time
from dataclasses import dataclass, field

import torch

from bitkernels.inference import Engine, Request, SamplingParams
from bitkernels.models import BiMambaForCausalLM

# A step that takes so long hangs.
PATIENCE = 120
# Of the logits' spread: what a sum in another order may change.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def resident_megabytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


@dataclass
class Soak:
    """What happened. ``growth``: by how much the most memory of the last quarter exceeds that of the first half, MB."""

    requests: list[Request] = field(default_factory=list)
    refused: int = 0
    growth: float = 0.0
    equal: int = 0  # requests with the tokens they get alone
    parted: int = 0  # and those that parted from them at a tie
    seconds: float = 0.0

    def __str__(self) -> str:
        reasons = [request.finish_reason for request in self.requests]
        counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
        return (
            f"{len(reasons)} requests in {self.seconds:.0f} s: {counts}; {self.refused} refused; {self.equal} "
            f"as alone, {self.parted} parted at a tie; memory grew by {self.growth:.1f} MB"
        )


def soak(
    model: BiMambaForCausalLM,
    count: int = 200,
    seconds: float = 0,
    longest: int = 50,
    seed: int = 5,
    compared: int = 200,
    **options,
) -> Soak:
    """At least so many requests, for at least so long, in an engine of ``options``; so many are compared.

    Raises AssertionError.
    """
    random = torch.Generator().manual_seed(seed)
    device, vocabulary = model.device, model.config.vocab_size

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=random))]

    def params() -> SamplingParams:
        return SamplingParams(
            pick(1, 2, 9, longest), pick(0, 0, 0.7, 1.3), pick(None, 1, 8), pick(0.8, 1.0), pick(0.0, 0.1),
            pick(1.0, 1.2), pick((), (3, 4)), seed=7,
        )  # fmt: skip

    engine, out = Engine(model, **options), Soak()
    begin, memory = time.perf_counter(), []
    while len(out.requests) < count or time.perf_counter() - begin < seconds:
        length = pick(1, 2, 7, longest // 3, longest, 3 * longest)
        prompt = torch.randint(vocabulary, (length,), generator=random)
        out.requests.append(engine.submit(prompt, params()))
        if pick(*[False] * 9, True):
            try:
                engine.submit(pick([], [vocabulary], [-1]), params())
            except ValueError:
                out.refused += 1
        # No more wait than run, so that a long soak is as many requests as the machine can do.
        for _ in range(pick(0, 1, 2, 5)):
            _step(engine)
        while len(engine._waiting) > engine.max_batch:
            _step(engine)
        if pick(*[False] * 7, True):
            engine.cancel(pick(*out.requests[-2 * engine.max_batch :]))
        memory.append(resident_megabytes(device))
    while not engine.idle:
        _step(engine)
    out.seconds = time.perf_counter() - begin
    memory.append(resident_megabytes(device))
    out.growth = max(memory[len(memory) * 3 // 4 :]) - max(memory[: (len(memory) + 1) // 2])
    assert sorted(engine._free) == list(range(engine.max_batch)), "a slot was lost"
    assert all(request.finished for request in out.requests)
    _compare(engine, out, compared, options.get("batch_invariant", False))
    return out


def _step(engine: Engine) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    engine.step()
    faulthandler.cancel_dump_traceback_later()


def _compare(engine: Engine, out: Soak, compared: int, exact: bool) -> None:
    """With the same request alone, in the same engine; draws too where batches change no bit."""
    comparable = [request for request in out.requests if exact or request.params.temperature == 0]
    for request in comparable[:: max(1, len(comparable) // compared)]:
        alone = engine.submit(request.prompt, request.params)
        while not engine.idle:
            _step(engine)
        got, expected = request.tokens, alone.tokens[: len(request.tokens)]
        if request.finish_reason != "cancelled":
            assert len(got) == len(alone.tokens) or not exact
        if got == expected:
            out.equal += 1
            continue
        assert not exact, f"{got} beside others, {expected} alone"
        out.parted += 1
        _assert_tie(engine.model, request, got, expected)


@torch.no_grad()
def _assert_tie(model: BiMambaForCausalLM, request: Request, got: list[int], expected: list[int]) -> None:
    """Where the tokens part first, both were as likely as the type of the activations can tell."""
    at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
    ids = torch.cat([request.prompt, torch.tensor(got[:at], dtype=torch.int64)]).to(model.device)
    logits = model(ids[None])[0, -1].float()
    if request.params.repetition_penalty != 1:
        seen = logits[ids]
        logits[ids] = torch.where(seen > 0, seen / request.params.repetition_penalty,
                                  seen * request.params.repetition_penalty)  # fmt: skip
    gap = (logits[got[at]] - logits[expected[at]]).abs() / logits.std()
    assert gap <= TOLERANCE[model.activation_dtype], f"token {at}: {got[at]} and {expected[at]} are {gap:.3g} apart"


def main() -> None:
    from bitkernels.checkpoint import load_checkpoint
    from bitkernels.data import shipped_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--growth", type=float, default=8, help="MB of memory that may stay")
    chosen = parser.parse_args()
    dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32
    model = load_checkpoint(shipped_model(), chosen.device, dtype).model
    for invariant in (True, False):
        result = soak(
            model, chosen.requests, chosen.seconds / 2, max_batch=chosen.max_batch, prefill_chunk=64,
            batch_invariant=invariant,
        )  # fmt: skip
        print(f"{'batch_invariant, ' if invariant else ''}{result}", flush=True)
        assert result.growth <= chosen.growth, "memory grew"


if __name__ == "__main__":
    main()
