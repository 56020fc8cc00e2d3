"""Post-training baselines: low-bit weights made from a trained full-precision model, with nothing learned after.

Each function changes a model in place. What is rounded stays dense, on the grid of its low-bit values, and its module's
``weight_bits`` says how many bits such a weight takes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitkernels.models import BiMambaForCausalLM
from bitkernels.nn import FBILinear
from bitkernels.nn.binary import MEAN_OVER, Scales
from bitkernels.nn.convert import replace_modules
from bitkernels.nn.ternary import TERNARY_BITS

# Of a scale, and of the smallest value, of each group of round-to-nearest.
_SCALE_BITS = 16


def _check(model: BiMambaForCausalLM) -> None:
    if model.config.low_bit:
        raise ValueError("post-training: the model must be full precision, got a low-bit one")


def _projections(model: BiMambaForCausalLM) -> list[nn.Linear]:
    return [linear for layer in model.layers for linear in (layer.mixer.in_proj, layer.mixer.out_proj)]


def least_squares_scales(weight: Tensor, scales: Scales = "column") -> tuple[Tensor, Tensor]:
    """The alpha and beta that make ``alpha * sign(W) + beta`` nearest to ``weight`` [N, K], with dimensions kept.

    Where all signs of a column (or row) are equal, alpha is 0 and beta the mean.
    """
    axis = MEAN_OVER[scales]
    wide = weight.double()
    signs = torch.where(wide < 0, -1.0, 1.0).to(wide.dtype)
    mean, mean_sign = wide.mean(axis, keepdim=True), signs.mean(axis, keepdim=True)
    covariance = (wide * signs).mean(axis, keepdim=True) - mean * mean_sign
    variance = 1 - mean_sign.square()
    alpha = torch.where(variance > 0, covariance / variance, 0.0)
    return alpha.to(weight.dtype), (mean - alpha * mean_sign).to(weight.dtype)


@torch.no_grad()
def sign_(model: BiMambaForCausalLM, scales: Scales = "column") -> BiMambaForCausalLM:
    """Naive sign: the projections become ``FBILinear`` layers with least-squares scales, which can be packed."""
    _check(model)

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        if name.rpartition(".")[2] not in ("in_proj", "out_proj"):
            return None
        layer = FBILinear.from_linear(module, scales)
        alpha, beta = least_squares_scales(layer.weight, scales)
        layer.alpha.copy_(alpha.view_as(layer.alpha))
        layer.beta.copy_(beta.view_as(layer.beta))
        return layer

    model.set_config_(model.config.replace(binarize="all", weight_format="binary", scales=scales))
    return replace_modules(model, convert)


def _untie_(model: BiMambaForCausalLM) -> None:
    if model.head is None:
        vocab_size, d_model = model.embedding.weight.shape
        model.head = nn.Linear(d_model, vocab_size, bias=False, device=model.device)
        model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
        model.set_config_(model.config.replace(tie_embeddings=False))


def _round_ternary_(module: nn.Module) -> None:
    weight = module.weight
    scale = weight.float().abs().mean().clamp(min=1e-5)
    weight.copy_((weight.float() / scale).round().clamp(-1, 1) * scale)
    module.weight_bits = TERNARY_BITS


@torch.no_grad()
def ternary_(model: BiMambaForCausalLM, embedding: bool = True, linears: bool = True) -> BiMambaForCausalLM:
    """Direct ternary quantisation (Mamba-2-EQ, -LQ, -(E+L)Q): ``clip(round(W s), -1, 1) / s``, one s for each tensor.

    ``linears`` takes the projections and the head. Weights alone are rounded: no norm is added and activations stay,
    since the model was not trained with either. A tied head is untied first, as in the paper's models.
    """
    _check(model)
    _untie_(model)
    chosen = [*_projections(model), model.head] if linears else []
    for module in dict.fromkeys([*chosen, *([model.embedding] if embedding else [])]):
        _round_ternary_(module)
    return model


@torch.no_grad()
def round_to_nearest(weight: Tensor, bits: int, group_size: int = 128) -> Tensor:
    """``weight`` [N, K] on an even grid of ``2 ** bits`` values between the extremes of each group of a row."""
    if bits < 1:
        raise ValueError(f"round_to_nearest: bits must be at least 1, got {bits}")
    if group_size < 1:
        raise ValueError(f"round_to_nearest: group_size must be at least 1, got {group_size}")
    rounded = []
    for group in weight.float().split(group_size, dim=1):
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp(min=1e-10)
        rounded.append(((group - low) / step).round() * step + low)
    return torch.cat(rounded, 1).to(weight.dtype)


@torch.no_grad()
def round_to_nearest_(model: BiMambaForCausalLM, bits: int, group_size: int = 128) -> BiMambaForCausalLM:
    """Rounds the projections to ``bits`` bits, each group of a row by its own scale and smallest value."""
    _check(model)
    for linear in dict.fromkeys(_projections(model)):
        linear.weight.copy_(round_to_nearest(linear.weight, bits, group_size))
        linear.weight_bits = bits + 2 * _SCALE_BITS / min(group_size, linear.in_features)
    return model


@dataclass(frozen=True)
class PostTraining:
    name: str
    summary: str
    apply: Callable[[BiMambaForCausalLM], BiMambaForCausalLM]  # in place, and returns it


POST_TRAINING = {
    method.name: method
    for method in (
        PostTraining("sign", "in_proj and out_proj to their signs, least-squares alpha and beta", sign_),
        PostTraining("mamba-2-eq", "embedding to ternary", lambda model: ternary_(model, linears=False)),
        PostTraining("mamba-2-lq", "linears and head to ternary", lambda model: ternary_(model, embedding=False)),
        PostTraining("mamba-2-elq", "embedding, linears and head to ternary", ternary_),
        PostTraining("rtn-4", "in_proj and out_proj to 4 bits in groups of 128", lambda m: round_to_nearest_(m, 4)),
        PostTraining("rtn-3", "in_proj and out_proj to 3 bits in groups of 128", lambda m: round_to_nearest_(m, 3)),
        PostTraining("rtn-2", "in_proj and out_proj to 2 bits in groups of 128", lambda m: round_to_nearest_(m, 2)),
    )
}
