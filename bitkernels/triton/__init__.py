"""Triton kernels for CUDA tensors: the scan and its neighbours, and portable packed matmuls.

Loaded by ``bitkernels._ops``, which decides what serves CUDA tensors.
"""


def register_scan(dispatch_key: str = "CUDA") -> None:
    """Registers the scan, convolution and norms for CUDA tensors."""
    from bitkernels.triton import add_rms_norm, causal_conv1d, gated_rms_norm, ssd_scan

    for module in (add_rms_norm, causal_conv1d, gated_rms_norm, ssd_scan):
        module.register(dispatch_key)


def register_packed(dispatch_key: str = "CUDA") -> None:
    """Registers the packed matmuls and decoding for CUDA tensors, where the CUDA library was not built."""
    from bitkernels.triton import (
        mamba2_step,
        pack,
        packed_linear,
        quantize_int8,
        sign_linear,
        ssd_step,
        ternary_linear,
    )

    for module in (mamba2_step, pack, packed_linear, quantize_int8, sign_linear, ssd_step, ternary_linear):
        module.register(dispatch_key)
