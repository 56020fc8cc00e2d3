"""Generation for a few prompts: an engine of its own for one call."""

import inspect
from collections.abc import Iterator, Sequence

from torch import Tensor

from bitkernels.inference.engine import Engine
from bitkernels.inference.sampling import SamplingParams
from bitkernels.models import BiMambaForCausalLM

Prompts = Tensor | Sequence[Sequence[int] | Tensor]
Sampling = SamplingParams | Sequence[SamplingParams] | None

_ENGINE_OPTIONS = frozenset(inspect.signature(Engine).parameters) - {"model"}


def stream(
    model: BiMambaForCausalLM, prompts: Prompts, sampling: Sampling = None, **options
) -> Iterator[tuple[int, int]]:
    """Yields (index of the prompt, its next token) as tokens come; see ``BiMambaForCausalLM.stream``."""
    for_engine = {name: options.pop(name) for name in _ENGINE_OPTIONS & options.keys()}
    if sampling is None:
        sampling = SamplingParams(**options)
    elif options:
        raise ValueError(f"generate: sampling was given, so {', '.join(options)} cannot be")
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    if len(each) != len(prompts):
        raise ValueError(f"generate: {len(each)} sampling settings for {len(prompts)} prompts")
    if len(prompts) == 0:
        return
    engine = Engine(model, **{"max_batch": len(prompts), **for_engine})
    index = {engine.submit(prompt, params): i for i, (prompt, params) in enumerate(zip(prompts, each, strict=True))}
    while not engine.idle:
        for request, token in engine.step():
            yield index[request], token


def generate(model: BiMambaForCausalLM, prompts: Prompts, sampling: Sampling = None, **options) -> list[list[int]]:
    """The new tokens of each prompt; see ``BiMambaForCausalLM.generate``."""
    new: list[list[int]] = [[] for _ in prompts]
    for i, token in stream(model, prompts, sampling, **options):
        new[i].append(token)
    return new
