"""Token by token generation with a constant-size state."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitkernels.models import BiMambaForCausalLM


def sample(
    logits: Tensor,  # [B, vocab_size]
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token for each row, [B]; ``temperature=0`` takes the likeliest.

    ``top_k`` keeps the k likeliest tokens; ``top_p`` then the fewest that together reach probability p.
    """
    if temperature < 0:
        raise ValueError(f"sample: temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sample: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample: top_p must be in (0, 1], got {top_p}")
    if temperature == 0:
        return logits.argmax(-1)
    values, tokens = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        values, tokens = values[:, :top_k], tokens[:, :top_k]
    probabilities = values.softmax(-1)
    if top_p is not None:
        # A token stays while those before it do not reach p, so the likeliest always stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)


def stream(
    model: BiMambaForCausalLM,
    ids: Tensor,  # int [B, T], prompts of equal length
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Sequence[int] = (),
) -> Iterator[Tensor]:
    """Yields the next tokens, [B], one position at a time.

    Ends after ``max_new_tokens``, or when every row has produced one of ``stop_tokens``; a row that stopped
    earlier repeats its stop token. The same ``seed`` gives the same text.
    """
    generator = None
    if seed is not None:
        generator = torch.Generator(device=model.device).manual_seed(seed)
    stops = torch.tensor(list(stop_tokens), dtype=ids.dtype, device=ids.device)
    stopped = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    cache = model.new_cache(ids.shape[0])
    logits = model.prefill(ids, cache)
    token = ids[:, -1]
    for i in range(max_new_tokens):
        if i > 0:
            logits = model.step(token, cache)
        token = torch.where(stopped, token, sample(logits, temperature, top_k, top_p, generator).to(ids.dtype))
        yield token
        if len(stops):
            stopped |= torch.isin(token, stops)
            if bool(stopped.all()):
                return


def generate(model: BiMambaForCausalLM, ids: Tensor, max_new_tokens: int, **options) -> Tensor:
    """The prompts and what follows them, [B, T + new]; ``options`` as in ``stream``."""
    new = list(stream(model, ids, max_new_tokens, **options))
    return torch.cat([ids, *(token.unsqueeze(1) for token in new)], 1)
