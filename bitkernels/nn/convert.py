"""One call from a full-precision model to a binary or ternary one, and from there to a packed one."""

from collections.abc import Callable
from typing import Literal

from torch import nn

from bitkernels.nn.binary import FBILinear, PackedLinear, Scales
from bitkernels.nn.ternary import BitEmbedding, BitLinear, PackedBitEmbedding, PackedBitLinear

WeightFormat = Literal["binary", "ternary"]
Filter = Callable[[str, nn.Module], bool]

PACKED_FORMS = {FBILinear: PackedLinear, BitLinear: PackedBitLinear, BitEmbedding: PackedBitEmbedding}


def all_linears(name: str, module: nn.Module) -> bool:
    """The default filter: every ``nn.Linear`` and no embedding."""
    return isinstance(module, nn.Linear)


def replace_modules(model: nn.Module, convert: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """Puts ``convert(name, module)`` in the place of each module for which it is not None.

    A module that occurs more than once is converted once and stays shared.
    """
    done: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        new = done[module] if module in done else convert(name, module)
        if new is None:
            continue
        done[module] = new
        if not name:
            return new
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def binarize_(
    model: nn.Module,
    filter: Filter = all_linears,
    format: WeightFormat = "binary",
    scales: Scales = "column",
    act_bits: int | None = 8,
) -> nn.Module:
    """Replaces linear layers by trainable 1-bit (``FBILinear``) or ternary (``BitLinear``) ones, in place.

    Args:
        model: any module. Where the model itself is a layer to convert, use the returned one.
        filter: ``filter(name, module)`` says which ``nn.Linear`` layers, and with ``format="ternary"``
            which ``nn.Embedding`` layers, to convert.
        format: ``"binary"`` or ``"ternary"``.
        scales: of the binary format: ``"column"``, ``"row"`` or ``"single"``.
        act_bits: of the ternary format: 8 for int8 activations, None to leave them.

    Layers are initialised from the weights they replace. A weight that a second module shares (a head
    tied to the embedding) is copied: the tie ends.
    """
    if format not in ("binary", "ternary"):
        raise ValueError(f"binarize_: format must be 'binary' or 'ternary', got {format!r}")

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear | nn.Embedding) or not filter(name, module):
            return None
        if isinstance(module, nn.Linear):
            ternary = format == "ternary"
            return BitLinear.from_linear(module, act_bits) if ternary else FBILinear.from_linear(module, scales)
        if format == "binary":
            raise ValueError(f"binarize_: {name} is an nn.Embedding, which has no binary form; use format='ternary'")
        return BitEmbedding.from_embedding(module)

    return replace_modules(model, convert)


def pack_(model: nn.Module, filter: Filter = lambda name, module: True) -> nn.Module:
    """Replaces latent layers by their packed forms, in place, and returns the model.

    ``filter(name, module)`` chooses among the ``FBILinear``, ``BitLinear`` and ``BitEmbedding`` layers.
    Raises ValueError, naming the parameter, where a weight or scale is not finite. ``packed_zeros``
    tells how many exact zeros became +1.
    """

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        packed = PACKED_FORMS.get(type(module))
        return packed.from_latent(module, name or type(module).__name__) if packed and filter(name, module) else None

    return replace_modules(model, convert)


def empty_packed_(model: nn.Module, filter: Filter = lambda name, module: True) -> nn.Module:
    """``pack_`` without the weights: for models, on the meta device too, that a packed checkpoint is loaded into."""

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        packed = PACKED_FORMS.get(type(module))
        return packed.empty_like(module) if packed and filter(name, module) else None

    return replace_modules(model, convert)


def packed_zeros(model: nn.Module) -> int:
    """How many latent weights were exactly zero, and became +1, when the model's binary layers were packed."""
    return sum(module.zeros for module in model.modules() if isinstance(module, PackedLinear))
