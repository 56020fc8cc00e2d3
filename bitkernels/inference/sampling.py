"""Sampling on the device: every request has settings of its own, and its draws depend on nothing but itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

# What a batch needs: the likeliest token, noise, or noise over tokens that were sorted first.
Mode = Literal["greedy", "draw", "sorted"]
MODES: tuple[Mode, ...] = ("greedy", "draw", "sorted")

# Below this a temperature only overflows; the likeliest token wins all the same.
_COLDEST = 1e-4
# Probabilities are summed as integers: exact, so in any order and any batch the same.
_PROBABILITY_ONE = 2.0**40
_EVERYTHING = 2**62
# Constants of the splitmix64 generator (Steele et al., 2014), as signed integers.
_GOLDEN, _MIX1, _MIX2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class SamplingParams:
    """How a request continues its prompt.

    Args:
        max_new_tokens: it ends after so many.
        temperature: 0 takes the likeliest token.
        top_k: keep the k likeliest tokens (more where they tie).
        top_p: of these, the fewest that together reach probability p.
        min_p: keep tokens of at least min_p times the probability of the likeliest.
        repetition_penalty: positive logits of tokens that occurred are divided by it, negative multiplied.
        stop_tokens: it ends after any of these, which is its last token.
        seed: the same seed gives the same draws, whatever else is in the batch; None draws a seed.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_tokens: Sequence[int] = field(default=())
    seed: int | None = None

    def __post_init__(self):
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "be at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "not be negative"),
            "top_k": (self.top_k is None or self.top_k >= 1, "be at least 1"),
            "top_p": (0 < self.top_p <= 1, "be in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "be in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "be positive"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "fit in 64 bits"),
        }
        for name, (good, must) in checks.items():
            if not good:
                raise ValueError(f"{name} must {must}, got {getattr(self, name)}")

    @property
    def mode(self) -> Mode:
        if self.temperature > 0 and (self.top_k is not None or self.top_p < 1):
            return "sorted"
        return "draw" if self.temperature > 0 or self.repetition_penalty != 1 else "greedy"


class Sampler:
    """The settings, last token, position and seen tokens of every slot, and a spare row for padding (slot -1)."""

    # Bytes an element of the logits takes while a batch is sampled.
    WORKSPACE = 48

    def __init__(self, slots: int, vocab_size: int, device: torch.device):
        rows = slots + 1
        self.token, self.position, self.seed = torch.zeros(3, rows, dtype=torch.int64, device=device)
        # temperature, top_k, top_p, min_p, repetition_penalty
        self.settings = torch.ones(rows, 5, device=device)
        self.seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)

    @staticmethod
    def nbytes(slots: int, vocab_size: int) -> int:
        return (slots + 1) * (vocab_size + 3 * 8 + 5 * 4)

    def join(self, slot: int, params: SamplingParams, seed: int, prompt: Tensor) -> None:
        """Sets a slot for a request whose ``prompt`` is going to be read."""
        device, vocab_size = self.seen.device, self.seen.shape[1]
        top_k = vocab_size if params.top_k is None else min(params.top_k, vocab_size)
        settings = [params.temperature, top_k, params.top_p, params.min_p, params.repetition_penalty]
        self.settings[slot].copy_(torch.tensor(settings), non_blocking=True)
        self.seed[slot], self.position[slot] = seed, prompt.numel()
        self.seen[slot] = False
        if params.repetition_penalty != 1:
            self.seen[slot, prompt.to(device, non_blocking=True)] = True

    def sample(self, logits: Tensor, slots: Tensor, mode: Mode) -> Tensor:
        """Draws the next token of each slot from [B, vocab_size] and remembers it; int64 [B]."""
        if mode == "greedy":
            token = logits.argmax(-1)
        else:
            token = draw(
                logits, self.seed[slots], self.position[slots], self.settings[slots], self.seen[slots], mode == "sorted"
            )
            # A Python scalar would be copied to the device, which no graph can capture.
            self.seen.index_put_((slots, token), torch.ones_like(token, dtype=torch.bool))
        self.token[slots] = token
        return token


def draw(
    logits: Tensor,  # [B, V]
    seed: Tensor,  # int64 [B]
    position: Tensor,  # int64 [B], where in its sequence the token will be
    settings: Tensor,  # float32 [B, 5]: temperature, top_k (V keeps all), top_p, min_p, repetition_penalty
    seen: Tensor,  # bool [B, V]
    sort: bool = True,
) -> Tensor:
    """Draws one token for each row, [B]. Without ``sort`` top_k and top_p are not looked at."""
    temperature, top_k, top_p, min_p, penalty = settings.unsqueeze(-1).unbind(1)
    logits = logits.float()
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    scaled = logits / temperature.clamp(min=_COLDEST)
    lowest = scaled.amax(-1, keepdim=True) + min_p.log()
    if sort:
        lowest = torch.maximum(lowest, _lowest_kept(scaled, top_k, top_p))
    # The Gumbel-max trick: argmax(logits / t - log(E)), here times t, so that t = 0 is the likeliest token exactly.
    score = logits - temperature * exponential(seed, position, logits.shape[-1]).log()
    return score.masked_fill(scaled < lowest, -math.inf).argmax(-1)


def _lowest_kept(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least of [B, V] that top_k, and top_p after it, leave; [B, 1]."""
    values = scaled.sort(-1, descending=True).values
    rank = torch.arange(values.shape[-1], device=values.device)
    values = values.masked_fill(rank >= top_k, -math.inf)
    mass = (values.softmax(-1) * _PROBABILITY_ONE).long()
    # A token stays while those before it do not reach p, so the likeliest always stays.
    limit = (top_p * _PROBABILITY_ONE).long().masked_fill(top_p >= 1, _EVERYTHING)
    kept = (mass.cumsum(-1) - mass < limit) & (rank < top_k)
    return values.gather(-1, kept.sum(-1, keepdim=True) - 1)


def exponential(seed: Tensor, position: Tensor, count: int) -> Tensor:
    """Exponential variates, float32 [B, count], of the counter (seed, position, index) alone."""
    row = _mix(_mix(seed) + position).unsqueeze(-1)
    bits = _mix(row + torch.arange(1, count + 1, device=seed.device) * _GOLDEN)
    # A uniform variate, never 0 or 1: the small ones, which win, keep all their bits.
    uniform = ((bits >> 1) & (2**62 - 1) | 1).float() * 2.0**-62
    return -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64. Shifts of int64 copy the sign, which the masks take away."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX2
    return x ^ ((x >> 31) & (2**33 - 1))
