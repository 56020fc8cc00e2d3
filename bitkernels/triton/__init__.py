"""Triton kernels for CUDA tensors: the scan and its neighbours, and portable packed matmuls.

``bitkernels._ops`` decides what serves CUDA tensors. Modules are loaded at the first call of an operator of theirs, as
to import Triton takes a fifth of a second and to compile anything, or find that it is compiled, half of one.
"""

import importlib
from collections.abc import Callable

import torch

from bitkernels.triton.arguments import on_its_device

# By module, what it implements.
_SCAN = {
    "add_rms_norm": ("add_rms_norm", "rms_norm", "add_rms_norm_backward"),
    "causal_conv1d": ("causal_conv1d", "causal_conv1d_backward", "causal_conv1d_step"),
    "gated_rms_norm": ("gated_rms_norm", "gated_rms_norm_backward"),
    "ssd_scan": ("ssd_scan", "ssd_scan_chunks", "ssd_scan_division"),
    "ssd_hopper": ("ssd_scan_backward",),
}
_PACKED = {
    "mamba2_step": ("mamba2_in_step", "mamba2_out_step", "mamba2_step"),
    "pack": ("pack_sign", "unpack_sign", "pack_ternary", "unpack_ternary"),
    "packed_linear": ("packed_linear", "packed_linear_backward", "explain_packed_linear"),
    "quantize_int8": ("quantize_int8", "fake_quantize_int8"),
    "sign_linear": ("sign_linear_weight_backward",),
    "ssd_step": ("ssd_step",),
    "ternary_linear": ("ternary_linear", "ternary_linear_backward", "explain_ternary_linear"),
}


def _loaded_when_called(module: str, name: str) -> Callable:
    function = None

    def call(*args, **named):
        nonlocal function
        if function is None:
            function = on_its_device(getattr(importlib.import_module(f"bitkernels.triton.{module}"), name))
        return function(*args, **named)

    return call


def _register(operators: dict[str, tuple[str, ...]], dispatch_key: str) -> None:
    for module, names in operators.items():
        for name in names:
            op = f"bitkernels::{name}"
            # What the CUDA library serves already stays as it is.
            if dispatch_key != "CUDA" or not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
                torch.library.impl(op, dispatch_key, _loaded_when_called(module, name))


def register_scan(dispatch_key: str = "CUDA") -> None:
    """Registers the scan, convolution and norms for CUDA tensors."""
    _register(_SCAN, dispatch_key)


def register_packed(dispatch_key: str = "CUDA") -> None:
    """Registers the packed matmuls and decoding for CUDA tensors, where the CUDA library was not built."""
    _register(_PACKED, dispatch_key)
