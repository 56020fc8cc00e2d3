"""The engine: what a request gets does not depend on how its prompt is read, nor on what runs beside it."""

import math

import pytest
import torch
from helpers import assert_close

from bitkernels.inference import Engine, SamplingParams, plan_memory
from bitkernels.inference import engine as engine_module
from bitkernels.inference.sampling import draw, exponential
from bitkernels.models import BiMambaConfig, BiMambaForCausalLM
from bitkernels.nn import pack_

SHAPE = BiMambaConfig(vocab_size=50, d_model=24, n_layer=2, headdim=8, d_state=12, chunk_size=16, binarize="all")
GREEDY = SamplingParams(max_new_tokens=6, temperature=0)


@pytest.fixture
def model(device):
    torch.manual_seed(1)
    return pack_(BiMambaForCausalLM(SHAPE)).to(device).eval()


def finish(engine, *requests):
    while not engine.idle:
        engine.step()
    return [request.tokens for request in requests]


def alone(model, prompt, params, **options):
    engine = Engine(model, **options)
    return finish(engine, engine.submit(prompt, params))[0]


def greedy_by_forward(model, prompt, count):
    ids = prompt.to(model.device)
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids[None])[0, -1].argmax(-1, keepdim=True)])
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize("chunk", [16, 1000])
def test_logits_equal_one_forward_for_every_prompt_length(model, chunk, monkeypatch):
    seen = []
    monkeypatch.setattr(
        engine_module.Sampler, "sample", lambda self, logits, slots, mode: seen.append(logits) or force(self, slots)
    )
    ids = torch.randint(50, (73,))

    def force(sampler, slots):
        sampler.token[slots] = ids[sampler.position[slots].cpu()].to(sampler.token.device)
        return sampler.token[slots]

    full = model(ids[None].to(model.device))[0]
    for length in range(1, 71):
        seen.clear()
        engine = Engine(model, max_batch=1, prefill_chunk=chunk)
        engine._graphs = None
        finish(engine, engine.submit(ids[:length], SamplingParams(max_new_tokens=3)))
        assert_close(f"prompt {length}", torch.cat(seen), full[length - 1 : length + 2])


def test_greedy_is_the_likeliest_of_one_forward(model):
    prompts = [torch.randint(50, (n,)) for n in (1, 2, 3, 17, 40, 5)]
    new = model.generate(prompts, max_new_tokens=8, temperature=0, prefill_chunk=7)
    assert new == [greedy_by_forward(model, prompt, 8) for prompt in prompts]
    equal = torch.randint(50, (3, 9), device=model.device)
    assert model.generate(equal, GREEDY) == [greedy_by_forward(model, prompt, 6) for prompt in equal.cpu()]
