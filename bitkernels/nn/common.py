"""What the latent and packed layers share."""

import torch
from torch import Tensor


def activation_dtype(x: Tensor) -> torch.dtype:
    """The type of the products that ``x`` takes part in: autocast's where it is on, else its own."""
    device = x.device.type
    if x.is_floating_point() and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocast_activation(x: Tensor) -> Tensor:
    """Casts ``x`` to the autocast type. Latent weights and scales stay in fp32: their signs and means are the model."""
    return x.to(activation_dtype(x))


def check_width(layer: str, x: Tensor, width: int) -> None:
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"{layer}: x must be [..., {width}], got {list(x.shape)}")


def check_finite(layer: str, **tensors: Tensor | None) -> None:
    """Packing discards the latent weight, so what it was made of is checked while it can still be repaired."""
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{layer}: {name} must be finite to be packed, got {count} non-finite values")
