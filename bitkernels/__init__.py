"""1-bit and ternary linear layers and the SSD scan for Mamba-2, as PyTorch operators.

``bitkernels.packed_linear`` and its siblings are the public functions; ``torch.ops.bitkernels.*`` the
operators under them; ``bitkernels.nn`` modules, ``bitkernels.models`` a thin Bi-Mamba, and
``bitkernels.host`` the NumPy half, which never loads torch. To keep it so, everything else here is
loaded at its first use, or at once where torch is loaded already.
"""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

# Public name -> the module that defines it.
_PUBLIC = {
    "add_rms_norm": "add_rms_norm",
    "bit_embedding": "bit_embedding",
    "build_info": "_ops",
    "causal_conv1d": "causal_conv1d",
    "causal_conv1d_step": "causal_conv1d",
    "dense_linear": "dense_linear",
    "distill_loss": "distill_loss",
    "explain": "explain",
    "gated_rms_norm": "gated_rms_norm",
    "head_step": "head_step",
    "mamba2_in_step": "mamba2_step",
    "mamba2_mixer": "mamba2_mixer",
    "mamba2_out_step": "mamba2_step",
    "mamba2_prompt": "mamba2_prompt",
    "mamba2_stack_step": "mamba2_stack_step",
    "mamba2_step": "mamba2_step",
    "pack_sign": "pack",
    "pack_ternary": "pack",
    "packed_linear": "packed_linear",
    "quantize_int8": "quantize_int8",
    "rms_norm": "add_rms_norm",
    "sign_linear": "sign_linear",
    "ssd_scan": "ssd_scan",
    "ssd_step": "ssd_step",
    "ternary_linear": "ternary_linear",
    "ternary_linear_ste": "ternary_linear_ste",
    "unpack_sign": "pack",
    "unpack_ternary": "pack",
}
_SUBMODULES = ("checkpoint", "compat", "data", "host", "inference", "models", "nn", "reference", "training")

__all__ = [*_PUBLIC, *_SUBMODULES, "__version__"]


class _Package(ModuleType):
    """A function and the module that defines it share their name; the function is what users mean.

    The import system binds a submodule to its name in the package, so the function is put back here.
    """

    def __setattr__(self, name, value):
        if isinstance(value, ModuleType) and _PUBLIC.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)


if "torch" in sys.modules:
    for _name in _PUBLIC:
        __getattr__(_name)
