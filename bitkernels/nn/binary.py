"""FBI-Linear (Bi-Mamba): ``W~ = alpha * sign(W) + beta``, and its packed form."""

from typing import Literal

import torch
from torch import Tensor, nn

from bitkernels import pack_sign, packed_linear, sign_linear
from bitkernels.nn.common import autocast_activation, check_finite, check_width

Scales = Literal["column", "row", "single"]

# The axis of W[N, K] that a scale is the mean over, and the shape it then has.
MEAN_OVER = {"column": 0, "row": 1, "single": (0, 1)}

# Published checkpoints call alpha and beta by these names.
_PUBLISHED_NAMES = {"alpha": "wscale", "beta": "wbias"}

_SIGNS_PER_WORD = 32


def scale_shape(scales: Scales, out_features: int, in_features: int) -> tuple[int, ...]:
    """The shape of alpha and of beta."""
    shapes = {"column": (1, in_features), "row": (out_features, 1), "single": (1,)}
    if scales not in shapes:
        raise ValueError(f"scales must be one of {', '.join(shapes)}, got {scales!r}")
    return shapes[scales]


class FBILinear(nn.Module):
    """A linear layer that trains 1-bit weights through a latent one.

    ``y = x @ (alpha * sign(weight) + beta)^T + bias`` with ``sign(0) = +1``; the gradient of sign is the
    identity. ``scales`` says what alpha and beta are indexed by: the input feature (``"column"``, as
    published), the output feature (``"row"``), or nothing (``"single"``).

    Under autocast only ``x`` is cast. Loads published checkpoints (``weight``, ``wscale``, ``wbias``).
    """

    weight_bits = 1.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scales: Scales = "column",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        shape = scale_shape(scales, out_features, in_features)
        factory = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.scales = in_features, out_features, scales
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.alpha = nn.Parameter(torch.empty(shape, **factory))
        self.beta = nn.Parameter(torch.empty(shape, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = self.in_features**-0.5 if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_scales()

    @torch.no_grad()
    def reset_scales(self) -> None:
        """``beta = mean W`` and ``alpha = mean |W - beta|``, over the axis that ``scales`` leaves out."""
        if self.weight.is_meta:  # where a mean would import torch's compiler
            return
        axis = MEAN_OVER[self.scales]
        beta = self.weight.mean(axis, keepdim=True)
        self.alpha.copy_((self.weight - beta).abs().mean(axis, keepdim=True).view_as(self.alpha))
        self.beta.copy_(beta.view_as(self.beta))

    @classmethod
    def from_linear(cls, linear: nn.Linear, scales: Scales = "column") -> "FBILinear":
        """The binary form of ``linear``; shares its bias and takes its weight as the latent one."""
        weight = linear.weight
        layer = cls(linear.in_features, linear.out_features, False, scales, weight.device, weight.dtype)
        layer.weight = nn.Parameter(weight.detach().clone())
        layer.bias = linear.bias
        layer.reset_scales()
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        check_width("FBILinear", x, self.in_features)
        return sign_linear(autocast_activation(x), self.weight, self.alpha, self.beta, self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for ours, published in _PUBLISHED_NAMES.items():
            if prefix + published in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + published)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scales={self.scales}"
        )


class PackedLinear(nn.Module):
    """A linear layer whose weight is one bit an element: the inference form of ``FBILinear``.

    ``zeros`` is how many latent weights were exactly zero when the layer was packed; one bit cannot hold
    zero, and they became +1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scales: Scales = "column",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        words = -(-in_features // _SIGNS_PER_WORD)
        shape = scale_shape(scales, out_features, in_features)
        self.in_features, self.out_features, self.scales, self.zeros = in_features, out_features, scales, 0
        self.register_buffer("w_packed", torch.zeros(out_features, words, dtype=torch.uint32, device=device))
        self.register_buffer("alpha", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("beta", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    @classmethod
    def empty_like(cls, layer: FBILinear) -> "PackedLinear":
        """A layer of the same geometry with all weights zero, to load a checkpoint into."""
        weight = layer.weight
        sizes = (layer.in_features, layer.out_features, layer.bias is not None, layer.scales)
        return cls(*sizes, weight.device, layer.alpha.dtype)

    @classmethod
    @torch.no_grad()
    def from_latent(cls, layer: FBILinear, name: str = "FBILinear") -> "PackedLinear":
        """Packs ``layer``; ``name`` is what an error calls it."""
        check_finite(name, weight=layer.weight, alpha=layer.alpha, beta=layer.beta, bias=layer.bias)
        packed = cls.empty_like(layer)
        packed.w_packed = pack_sign(layer.weight)
        packed.zeros = int((layer.weight == 0).sum())
        packed.alpha.copy_(layer.alpha)
        packed.beta.copy_(layer.beta)
        if layer.bias is not None:
            packed.bias.copy_(layer.bias)
        return packed.train(layer.training)

    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """w_packed, alpha, beta and bias."""
        of = self._buffers
        return of["w_packed"], of["alpha"], of["beta"], of["bias"]

    def forward(self, x: Tensor) -> Tensor:
        check_width("PackedLinear", x, self.in_features)
        return packed_linear(autocast_activation(x), self.w_packed, self.alpha, self.beta, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scales={self.scales}"
        )
