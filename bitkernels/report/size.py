"""What a model takes: parameter-bits, as Slender-Mamba counts them, and bytes on disk."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from bitkernels.checkpoint import save_checkpoint
from bitkernels.models import BiMambaConfig, BiMambaForCausalLM

_FULL_BITS = 16


def parameter_bits(model: nn.Module) -> float:
    """P_b, the bits of all parameters: 1 or 1.58 for a low-bit weight, 16 for every other parameter.

    ``model`` is latent or on the meta device. Parameters that are shared or tied count once.
    """
    total = 0.0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            bits = getattr(module, "weight_bits", _FULL_BITS) if name == "weight" else _FULL_BITS
            total += bits * parameter.numel()
    return total


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def full_precision_bytes(config: BiMambaConfig) -> int:
    """All parameters in 16 bits, as the papers count the storage of a full-precision model."""
    return parameter_count(BiMambaForCausalLM.on_meta(config)) * _FULL_BITS // 8


def packed_bytes(config: BiMambaConfig) -> int:
    """The tensors of the file that ``bitkernels pack`` writes, from their shapes alone."""
    model = BiMambaForCausalLM.on_meta(config, packed=True)
    for module in (model.get_submodule(name.removesuffix(".weight")) for name in model.dense_weights):
        module.to(torch.bfloat16)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def packed_file_bytes(model: BiMambaForCausalLM) -> int:
    """The size of the file of a packed ``model``, measured; tensors on the meta device are written as zeros."""
    if model.device.type == "meta":
        model = model.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            (tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor).zero_()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        save_checkpoint(path, model, dense_dtype=torch.bfloat16)
        return path.stat().st_size
