"""The peers, where they can be imported; an absent one is recorded as absent."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from harness import Absent, Contender, nbytes, on_copies
from torch import Tensor


def dense_linear(x: Tensor, w: Tensor, y: Tensor, name: str | None = None) -> Contender:
    """F.linear with the dense weight: cuBLAS on a GPU."""
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[x.dtype]
    library = "cuBLAS" if x.is_cuda else "F.linear"
    # Bytes: x and W once, y once.
    return Contender(name or f"{library} {dtype}", on_copies(F.linear, x, w), nbytes(x, w, y))


def bare_read(tensor: Tensor) -> Contender:
    """On a GPU, a kernel that reads the tensor and does nothing else."""
    from bare_read import read

    return Contender("bare read of the weights", on_copies(read, tensor), nbytes(tensor))


def _import(name: str) -> ModuleType | str:
    """The module, or why it cannot be used here."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported: {error}"


def gemlite_linear(
    name: str, bits: int, x: Tensor, codes: Tensor, scale: Tensor, zero: float, wanted: bool
) -> Contender | Absent:
    """GemLite's 1- or 2-bit layer of ``scale * (codes - zero)``, one scale per row. It tunes for 10 to 20 s a shape."""
    helper = "gemlite needs a GPU" if not x.is_cuda else _import("gemlite.helper")
    if not (isinstance(helper, str) or wanted):
        helper = "not timed in this run, which tunes it for other cases"
    if isinstance(helper, str):
        return Absent(name, helper)
    build = {1: helper.A16W1_HQQ_INT, 2: helper.A16W2_HQQ_INT}[bits]

    def make():
        scales = scale.expand(codes.shape[0], 1).to(x.dtype).contiguous()
        zeros = torch.full_like(scales, zero)
        layer = build(device="cuda:0", dtype=x.dtype).from_weights(codes.clone(), scales, zeros)
        own = x.clone()
        return lambda: layer(own)

    # Bytes: x once, the codes once, y once.
    size = codes.numel() * bits // 8 + nbytes(x) + x.numel() // x.shape[-1] * codes.shape[0] * x.element_size()
    return Contender(name, make, size)


def mamba_ssm(module: str, device: str, folder: str = "ops.triton.") -> ModuleType | str:
    """A module of mamba_ssm, of its Triton kernels where no other ``folder`` is given.

    Importing the package imports compiled extensions and language models that these modules do not use, so they are
    imported from its folder without it.
    """
    if device != "cuda":
        return "mamba_ssm needs a GPU"
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        return "mamba_ssm is not installed"
    if "mamba_ssm" not in sys.modules:
        sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)
    return _import(f"mamba_ssm.{folder}{module}")


def mamba_scan(device: str, wanted: bool) -> Callable | str:
    """mamba_ssm's scan, or why it is not timed. It tunes itself for about a minute."""
    found = mamba_ssm("ssd_combined", device)
    if isinstance(found, str):
        return found
    return found.mamba_chunk_scan_combined if wanted else "not timed in this run, which tunes it for other cases"
