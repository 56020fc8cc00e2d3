"""The engine: what a request gets does not depend on how its prompt is read, nor on what runs beside it."""

import math

import pytest
import torch
from helpers import TOLERANCE, assert_close, rms_error
from soak import soak

from bitkernels.inference import Engine, SamplingParams, plan_memory
from bitkernels.inference import engine as engine_module
from bitkernels.inference.memory import check_memory
from bitkernels.inference.sampling import draw, exponential
from bitkernels.models import BiMambaConfig, BiMambaForCausalLM
from bitkernels.models.bimamba import Packed
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


@pytest.fixture
def read(monkeypatch):
    """What an engine computes where ``ids`` are read: the logits after the prompt and after what follows it."""
    seen = []
    monkeypatch.setattr(engine_module, "_DecodeGraphs", lambda engine: None)

    def logits(model, ids, length, chunk):
        def force(sampler, found, slots, mode):
            seen.append(found)
            sampler.token[slots] = ids[sampler.position[slots].cpu()].to(sampler.token.device)
            return sampler.token[slots]

        seen.clear()
        monkeypatch.setattr(engine_module.Sampler, "sample", force)
        engine = Engine(model, max_batch=1, prefill_chunk=chunk)
        finish(engine, engine.submit(ids[:length], SamplingParams(max_new_tokens=len(ids) - length)))
        return torch.cat(seen)

    return logits


@pytest.mark.parametrize("chunk", [16, 1000])
def test_logits_equal_one_forward_for_every_prompt_length(model, chunk, read):
    ids = torch.randint(50, (73,))
    full = model(ids[None].to(model.device))[0]
    for length in range(1, 71):
        logits = read(model, ids[: length + 3], length, chunk)
        assert_close(f"prompt {length}", logits, full[length - 1 : length + 2])


def test_bf16_logits_are_as_accurate_as_one_bf16_forward(model, read):
    ids = torch.randint(50, (73,))
    model.set_activation_dtype_(torch.bfloat16).set_activation_dtype_(torch.float32)
    exact = model(ids[None].to(model.device))[0]
    model.set_activation_dtype_(torch.bfloat16)
    limit = 1.1 * rms_error(model(ids[None].to(model.device))[0], exact)
    for length in range(1, 71, 3):
        error = rms_error(read(model, ids, length, 16), exact[length - 1 : -1])
        assert error <= max(limit, TOLERANCE[torch.bfloat16]), f"prompt {length}: {error:.3g} above {limit:.3g}"


@pytest.mark.parametrize("heads", [4, 24])  # on Hopper GPUs two kernels of the scan
@torch.no_grad()
def test_long_prompts_are_as_accurate_as_one_bf16_forward(heads, device, read):
    """Chunks of so many tokens that on GPUs the output projection takes norm and sum along."""
    torch.manual_seed(1)
    shape = SHAPE.replace(d_model=32 * heads, headdim=64, d_state=64)
    model = pack_(BiMambaForCausalLM(shape)).to(device).eval()
    ids = torch.randint(50, (4503,))
    model.set_activation_dtype_(torch.bfloat16).set_activation_dtype_(torch.float32)
    exact = model(ids[None].to(device))[0]
    model.set_activation_dtype_(torch.bfloat16)
    limit = max(1.1 * rms_error(model(ids[None].to(device))[0], exact), TOLERANCE[torch.bfloat16])
    for length, chunk in ((4500, 2048), (4500, 5000), (2048, 4096)):
        error = rms_error(read(model, ids[: length + 3], length, chunk), exact[length - 1 : length + 2])
        assert error <= limit, f"prompt {length} by {chunk}: {error:.3g} above {limit:.3g}"
    # Several at once, of equal lengths and of different ones.
    for lengths in ((1024, 1024), (1000, 1500, 30)):
        cache = model.new_cache(len(lengths))
        packed = Packed.of(lengths, range(len(lengths)), shape.d_conv, model.device)
        logits = model.prefill_packed(torch.cat([ids[:n] for n in lengths]).to(device), packed, cache)
        error = rms_error(logits, exact[[n - 1 for n in lengths]])
        assert error <= limit, f"prompts {lengths}: {error:.3g} above {limit:.3g}"


def test_greedy_is_the_likeliest_of_one_forward(model):
    prompts = [torch.randint(50, (n,)) for n in (1, 2, 3, 17, 40, 5)]
    new = model.generate(prompts, max_new_tokens=8, temperature=0, prefill_chunk=7)
    assert new == [greedy_by_forward(model, prompt, 8) for prompt in prompts]
    equal = torch.randint(50, (3, 9), device=model.device)
    assert model.generate(equal, GREEDY) == [greedy_by_forward(model, prompt, 6) for prompt in equal.cpu()]


def test_a_request_gets_what_it_gets_alone_whatever_joins_leaves_and_is_cancelled(model):
    options = {"max_batch": 3, "prefill_chunk": 16, "batch_invariant": True}
    prompts = [torch.randint(50, (n,)) for n in (5, 33, 1, 16, 20, 2)]
    params = [SamplingParams(max_new_tokens=n, temperature=0) for n in (9, 3, 12, 5, 1, 7)]
    engine = Engine(model, **options)
    requests = [engine.submit(*pair) for pair in zip(prompts[:3], params[:3], strict=True)]
    for _ in range(4):
        engine.step()
    requests += [engine.submit(*pair) for pair in zip(prompts[3:], params[3:], strict=True)]
    engine.cancel(requests[2])
    before = list(requests[2].tokens)
    got = finish(engine, *requests)
    expected = [alone(model, *pair, **options) for pair in zip(prompts, params, strict=True)]
    assert requests[2].finish_reason == "cancelled"
    assert got[2] == before == expected[2][: len(before)]
    del got[2], expected[2]
    assert got == expected


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_seeds_give_the_same_draws_in_any_batch(model, state_dtype):
    options = {"state_dtype": state_dtype, "batch_invariant": True, "max_batch": 4}
    prompts = [torch.randint(50, (n,)) for n in (4, 9, 30)]
    params = [SamplingParams(12, 0.9, top_k=20, top_p=0.9, seed=seed) for seed in (3, 2**63 - 1, -5)]
    together = model.generate(prompts, params, **options)
    assert together == [alone(model, *pair, **options) for pair in zip(prompts, params, strict=True)]
    other = SamplingParams(12, 0.9, top_k=20, top_p=0.9, seed=4)
    assert alone(model, prompts[0], other, **options) != together[0]


class ReplayedCalls(engine_module._DecodeGraphs):
    """Stands for CUDA graphs: a replay calls what was captured and writes to the same memory."""

    def _graph(self, call):
        result = call()

        class Graph:
            @staticmethod
            def replay():
                again = call()
                if result is not None:
                    result.copy_(again)

        return Graph, result

    def replay(self, slots, mode):
        return super().replay(slots, mode).clone()  # a GPU's tokens are copied to the host


@torch.no_grad()
def test_steps_that_are_padded_and_read_late():
    """How a GPU is driven, on a CPU."""
    model = pack_(BiMambaForCausalLM(SHAPE)).eval()
    engine = Engine(model, max_batch=6, prefill_chunk=16)
    engine._graphs, engine._lag = ReplayedCalls(engine), 1
    assert engine._graphs.sizes == [1, 2, 4, 6]
    prompts = [torch.randint(50, (n,)) for n in (3, 30, 1, 8, 2, 5, 40, 6)]
    lengths = [4, 9, 1, 12, 3, 7, 2, 5]
    requests = []
    for prompt, length in zip(prompts, lengths, strict=True):
        params = SamplingParams(length, 0, top_k=3, repetition_penalty=1.0 if length % 2 else 1.0001)
        requests.append(engine.submit(prompt, params))
        new = engine.step()
        # The first token of all waits for no capture.
        assert new or len(requests) > 1
        assert engine._graphs.captured == (len(requests) > 1)
    drawn = engine.submit([7], SamplingParams(9, 0.9, top_k=5, seed=2))
    stopping = engine.submit(prompts[1], SamplingParams(9, 0, stop_tokens=[greedy_by_forward(model, prompts[1], 3)[2]]))
    finish(engine)
    for request, length in zip(requests, lengths, strict=True):
        assert request.tokens == greedy_by_forward(model, request.prompt, length)
    assert drawn.tokens == alone(model, [7], drawn.params)
    assert stopping.tokens == alone(model, prompts[1], stopping.params)
    assert stopping.finish_reason == "stop"
    assert sorted(engine._free) == list(range(6))


@torch.no_grad()
def test_16_bit_states_stay_near_the_forward(model):
    prompt = torch.randint(50, (40,))
    for dtype in (torch.bfloat16, torch.float16):
        engine = Engine(model, 1, dtype, prefill_chunk=16)
        request = engine.submit(prompt, SamplingParams(12, 0))
        tokens = torch.tensor(finish(engine, request)[0])
        logits = model(torch.cat([prompt, tokens]).to(model.device)[None])[0, len(prompt) - 1 : -1].cpu()
        gap = logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]
        assert (gap <= 0.05 * logits.std()).all(), gap


def test_stop_tokens_end_a_request_and_streams_stream(model):
    prompt = torch.randint(50, (4,))
    greedy = alone(model, prompt, GREEDY)
    stop = greedy[3]
    engine = Engine(model)
    stopped = engine.submit(prompt, SamplingParams(6, 0, stop_tokens=[stop]))
    beside = engine.submit(prompt, GREEDY)
    assert list(engine.stream(stopped)) == greedy[: greedy.index(stop) + 1]
    assert stopped.finish_reason == "stop"
    assert list(engine.stream(beside)) == greedy
    assert beside.finish_reason == "length"
    first, *_ = model.stream([prompt], GREEDY)
    assert first == (0, greedy[0])


def test_a_bad_request_errors_alone(model):
    engine = Engine(model, max_tokens=20)
    good = engine.submit([1, 2, 3], GREEDY)
    bad = {
        "token id 50 at 1": [1, 50],
        "token id -1 at 0": [-1],
        "at least one token": [],
        "must hold integers": torch.ones(3),
        "15 tokens and 6 new ones are more than 20": [0] * 15,
    }
    for message, prompt in bad.items():
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt, GREEDY)
    assert finish(engine, good) == [greedy_by_forward(model, torch.tensor([1, 2, 3]), 6)]


def test_a_failing_step_ends_what_runs_and_nothing_else(model, monkeypatch):
    monkeypatch.setattr(engine_module, "_DecodeGraphs", lambda engine: None)
    engine = Engine(model, max_batch=2, prefill_chunk=8)
    prompts = [torch.randint(50, (n,)) for n in (3, 20, 4, 5)]
    requests = [engine.submit(prompt, GREEDY) for prompt in prompts]
    engine.step()
    step = model.step
    monkeypatch.setattr(model, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(model, "step", step)
    assert [r.finish_reason for r in requests] == ["error", "error", None, None]
    assert isinstance(requests[0].error, KeyboardInterrupt)
    with pytest.raises(RuntimeError, match="batch that failed"):
        list(engine.stream(requests[0]))
    again = engine.submit(prompts[0], GREEDY)
    finish(engine)
    for request in (*requests[2:], again):
        assert request.tokens == greedy_by_forward(model, request.prompt, 6)


def test_closing_a_stream_frees_its_slot(model):
    engine = Engine(model, max_batch=1)
    first, second = (engine.submit([i], SamplingParams(max_new_tokens=10_000)) for i in (1, 2))
    tokens = engine.stream(first)
    next(tokens)
    tokens.close()
    assert first.finish_reason == "cancelled"
    next(engine.stream(second))
    assert second.tokens


def test_memory_is_told_and_too_much_is_refused(model):
    plan = plan_memory(model, 4, torch.bfloat16, 256)
    engine = Engine(model, 4, torch.bfloat16, prefill_chunk=256)
    assert engine.memory == plan
    assert plan.states == engine._cache.nbytes
    assert plan.weights == sum(t.nbytes for t in model.state_dict().values())
    assert plan.sampling == sum(t.nbytes for t in vars(engine._sampler).values())
    with pytest.raises(ValueError, match=r"needs .* MB \(weights .* the limit is 0\.1 MB"):
        Engine(model, 4, memory_limit=100_000)
    with pytest.raises(ValueError, match=r"MB are free"):
        Engine(model, 10**8)
    with pytest.raises(ValueError, match=r"MB are free"):
        check_memory(plan_memory(model, 10**8, torch.float16, 1), model.device)
    assert plan_memory(BiMambaForCausalLM.on_meta(SHAPE, packed=True), 4, torch.bfloat16, 256) == plan


@pytest.mark.parametrize("wrong", [{"state_dtype": torch.int8}, {"max_batch": 0}, {"prefill_chunk": 0}])
def test_bad_engine_arguments(model, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Engine(model, **wrong)


def test_batch_invariance_has_a_limit_on_gpus(model):
    options = {"max_batch": 257, "batch_invariant": True}
    if model.device.type == "cuda":
        with pytest.raises(ValueError, match="max_batch must be at most 256 on a GPU"):
            Engine(model, **options)
    else:
        assert Engine(model, **options).max_batch == 257


def test_generate_arguments(model):
    assert model.generate([]) == []
    with pytest.raises(ValueError, match="2 sampling settings for 1 prompts"):
        model.generate([[1]], [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="sampling was given, so top_k"):
        model.generate([[1]], GREEDY, top_k=2)


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_soak(model, batch_invariant):
    """The short form; tests/soak.py runs for minutes."""
    result = soak(model, 40, longest=16, max_batch=4, prefill_chunk=16, batch_invariant=batch_invariant)
    assert result.refused
    assert result.equal > 10


def settings(rows, temperature=1.0, top_k=4, top_p=1.0, min_p=0.0, penalty=1.0, device="cpu"):
    return torch.tensor([temperature, top_k, top_p, min_p, penalty], device=device).expand(rows, -1)


def drawn(logits, seen=(), rows=4000, sort=True, **options):
    """How often each token is drawn by requests of different seeds."""
    logits = torch.tensor(logits)
    mask = torch.zeros(rows, len(logits), dtype=torch.bool)
    mask[:, list(seen)] = True
    tokens = draw(
        logits.expand(rows, -1), torch.arange(rows), torch.full((rows,), 9), settings(rows, **options), mask, sort
    )
    return torch.bincount(tokens, minlength=len(logits)) / rows


LOGITS = [0.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LOGITS),
        ({"sort": False}, LOGITS),
        ({"temperature": 2.0}, [0.0, 1.5, 1.0, 0.5]),
        ({"top_k": 2}, [-math.inf, 3.0, 2.0, -math.inf]),
        ({"top_p": 0.5}, [-math.inf, 3.0, -math.inf, -math.inf]),
        ({"top_p": 0.7}, [-math.inf, 3.0, 2.0, -math.inf]),
        ({"top_k": 3, "top_p": 0.9}, [-math.inf, 3.0, 2.0, -math.inf]),
        ({"min_p": 0.2}, [-math.inf, 3.0, 2.0, -math.inf]),
        ({"sort": False, "min_p": 0.1}, [-math.inf, 3.0, 2.0, 1.0]),
        ({"penalty": 2.0, "seen": (0, 1)}, [0.0, 1.5, 2.0, 1.0]),
        ({"temperature": 0.0}, [-math.inf, 0.0, -math.inf, -math.inf]),
        ({"temperature": 0.0, "penalty": 4.0, "seen": (1,)}, [-math.inf, -math.inf, 0.0, -math.inf]),
    ],
)
def test_draws_follow_the_distribution(options, expected):
    probabilities = torch.tensor(expected).softmax(-1)
    found = drawn(LOGITS, **options)
    assert (found - probabilities).abs().max() < 0.03, found
    assert found[probabilities == 0].sum() == 0


def test_a_penalty_multiplies_negative_logits():
    assert drawn([-1.0, -1.5], seen=(0,), temperature=0.0, top_k=2, penalty=2.0).tolist() == [0, 1]


def test_noise_is_exponential_and_of_its_counter_alone(device):
    seed, position = torch.tensor([0, 1, 2, 2**62]), torch.tensor([5, 5, 5, 6])
    noise = exponential(seed.to(device), position.to(device), 100_000).cpu()
    assert noise.isfinite().all()
    assert (noise > 0).all()
    for row in noise.double():
        assert row.mean() == pytest.approx(1, abs=0.02)
        assert row.var() == pytest.approx(1, abs=0.05)
        assert (row < 0.01).double().mean() == pytest.approx(0.00995, abs=0.001)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.02
    assert_close("one row", exponential(seed[2:3].to(device), position[2:3].to(device), 100_000).cpu()[0], noise[2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": math.inf}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2.0},
        {"repetition_penalty": 0.0}, {"max_new_tokens": 0}, {"seed": 2**63},
    ],
)  # fmt: skip
def test_bad_sampling_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_the_mode_is_the_least_work_that_does_it():
    assert SamplingParams(temperature=0, top_k=5).mode == "greedy"
    assert SamplingParams(temperature=0, repetition_penalty=1.1).mode == "draw"
    assert SamplingParams(min_p=0.1).mode == "draw"
    assert SamplingParams(top_p=0.9).mode == "sorted"
