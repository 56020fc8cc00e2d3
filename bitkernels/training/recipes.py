"""The named recipes: what is low-bit, what is minimised, and how, as the two papers have it."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bitkernels.models import BiMambaConfig, BiMambaForCausalLM
from bitkernels.nn import FBILinear
from bitkernels.training.loop import TrainConfig

# A short run warms up for this share of its steps, however many the paper's run had.
_LONGEST_WARMUP = 0.1


@dataclass(frozen=True)
class Recipe:
    """A named way to train.

    ``model`` are the fields of ``BiMambaConfig`` that it fixes; the shape is free. ``objective`` is
    ``"cross_entropy"`` (of the teacher's whole distribution, Bi-Mamba eq. 6), ``"kl"``, or ``"next_token"``, which
    needs no teacher. ``warmup`` is a share of the steps, or as an integer a number of steps, of which a short run does
    at most a tenth of its own. ``final_lr`` is a share of ``lr``, reached as a cosine.
    """

    name: str
    summary: str
    model: dict[str, Any] = field(default_factory=dict)
    objective: str = "next_token"
    lr: float = 2.5e-4
    final_lr: float = 0.1
    warmup: float | int = 2000
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    @property
    def distils(self) -> bool:
        return self.objective != "next_token"

    @property
    def can_start(self) -> bool:
        """Whether a full-precision model can give the weights to start from."""
        return self.model.get("sharing", "none") == "none"

    def config(self, shape: BiMambaConfig) -> BiMambaConfig:
        """``shape`` with what the recipe makes low-bit; layers that are shared are half as many as positions."""
        changes = dict(self.model)
        if changes.get("sharing", "none") not in ("none", "universal"):
            changes["n_unique"] = max(1, shape.n_layer // 2)
        return shape.replace(**{**_FULL_PRECISION, **changes})

    def train_config(self, steps: int, **options: Any) -> TrainConfig:
        """How to train for ``steps``; ``options`` are further fields of ``TrainConfig``, and take precedence."""
        warmup = self.warmup / steps if isinstance(self.warmup, int) else self.warmup
        own = {
            "lr": self.lr,
            "final_lr": self.final_lr,
            "warmup": min(warmup, _LONGEST_WARMUP),
            "weight_decay": self.weight_decay,
            "betas": self.betas,
            "clip": self.clip,
            "objective": self.objective,
        }
        return TrainConfig(steps, **{**own, **options})

    def record(self, config: TrainConfig, start: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a checkpoint says about its training; ``start`` is what that of the weights it started from says."""
        own = {
            "recipe": self.name,
            "steps": config.steps,
            "tokens_per_step": config.batch_size * config.length,
            "lr": config.lr,
            "seed": config.seed,
        }
        return own if start is None else {**own, "start_tokens": tokens_read(start)}


def tokens_read(training: dict[str, Any]) -> int:
    """Tokens behind a checkpoint's weights, by its record: of its own training, and of what it started from."""
    return training.get("start_tokens", 0) + training.get("steps", 0) * training.get("tokens_per_step", 0)


_FULL_PRECISION = {
    "binarize": "none",
    "weight_format": "binary",
    "ternary_embedding": False,
    "ternary_head": False,
    "sharing": "none",
    "n_unique": 1,
}
_BI_MAMBA = Recipe(
    "bi-mamba",
    "in_proj and out_proj 1-bit, distilled from a teacher's whole distribution (eq. 6)",
    {"binarize": "all", "tie_embeddings": True},
    "cross_entropy",
)
_TERNARY = {"binarize": "all", "weight_format": "ternary"}
_SLENDER = Recipe(
    "slender-mamba",
    "linears, embedding and head ternary, int8 activations",
    {**_TERNARY, "ternary_embedding": True, "ternary_head": True, "tie_embeddings": False},
    lr=1.6e-3,
    final_lr=0.0,
    warmup=0.1,
    weight_decay=0.1,
)


def _bi_mamba(suffix: str, summary: str, objective: str = "cross_entropy", **model: Any) -> Recipe:
    return replace(
        _BI_MAMBA, name=f"bi-mamba-{suffix}", summary=summary, objective=objective, model={**_BI_MAMBA.model, **model}
    )


def _slender(name: str, summary: str, **model: Any) -> Recipe:
    return replace(_SLENDER, name=name, summary=summary, model={**_SLENDER.model, **model})


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _slender(
            "mamba-2", "full precision, tied embeddings: the baseline and teacher of Bi-Mamba",
            binarize="none", ternary_embedding=False, ternary_head=False, tie_embeddings=True,
        ),
        _slender(
            "mamba-2-untied", "full precision with a head of its own: the baseline of Slender-Mamba",
            binarize="none", ternary_embedding=False, ternary_head=False,
        ),
        _BI_MAMBA,
        _bi_mamba("in-proj", "in_proj alone 1-bit", binarize="in_proj"),
        _bi_mamba("kl", "bi-mamba with the KL divergence as its objective", "kl"),
        _bi_mamba("next-token", "bi-mamba without a teacher", "next_token"),
        _SLENDER,
        _slender("slender-mamba-lq", "linears and head ternary", ternary_embedding=False),
        _slender("slender-mamba-eq", "the embedding alone ternary", binarize="none", ternary_head=False),
        _slender(
            "bitnet", "the linears of the blocks alone ternary, as BitNet has it",
            ternary_embedding=False, ternary_head=False,
        ),
        _slender("slender-mamba-sequence", "half the layers, each used twice: AABB", sharing="sequence"),
        _slender("slender-mamba-cycle", "half the layers, used in turn: ABAB", sharing="cycle"),
        _slender("slender-mamba-cycle-rev", "half the layers, there and back: ABBA", sharing="cycle_rev"),
        _slender("slender-mamba-universal", "one layer at every position", sharing="universal"),
    )
}  # fmt: skip


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


@torch.no_grad()
def start_from_(model: BiMambaForCausalLM, source: BiMambaForCausalLM) -> BiMambaForCausalLM:
    """Copies the weights of a full-precision ``source`` into ``model``, whose latent weights they become.

    Scales of binary layers are set from them. A head where the source has none starts as its embedding. The shapes
    must be the same, and ``model`` must not share layers, since a layer cannot start as several.
    """
    if source.config.low_bit:
        raise ValueError("start_from_: the source must be full precision, got a low-bit model")
    if model.config.sharing != "none":
        raise ValueError(f"start_from_: layers are shared ({model.config.sharing}) and cannot start as the source's")
    weights, own = dict(source.named_parameters()), dict(model.named_parameters())
    if "head.weight" in own and "head.weight" not in weights:
        weights["head.weight"] = weights["embedding.weight"]
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            shapes = f"{list(own[name].shape)} in the model, {list(weights[name].shape)} in the source"
            raise ValueError(f"start_from_: {name} is {shapes}")
        own[name].copy_(weights[name])
    for module in model.modules():
        if isinstance(module, FBILinear):
            module.reset_scales()
    return model


def build(recipe: Recipe, shape: BiMambaConfig, start: BiMambaForCausalLM | None = None) -> BiMambaForCausalLM:
    """The recipe's model in ``shape``, with random weights, or with those of the full-precision ``start``.

    The papers start from nothing and read 105 or 150 billion tokens; a short run cannot.
    """
    model = BiMambaForCausalLM(recipe.config(shape))
    return model if start is None else start_from_(model.to(start.device), start)
