"""Loads the native libraries, chooses what serves CUDA tensors, and tells what was built."""

import importlib.util
import platform
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


# Before what loads the operators, which import it.
def needed_grads(ctx, count: int) -> tuple[bool, ...]:
    """``ctx.needs_input_grad`` of an operator's ``count`` arguments: torch drops trailing defaults."""
    return (*ctx.needs_input_grad, *([False] * count))[:count]


if not (_FOLDER / "_C.so").is_file():
    raise ImportError(
        f"bitkernels: the native library {_FOLDER / '_C.so'} is missing; build it with `pip install -e .` "
        "in the source tree"
    )
torch.ops.load_library(_FOLDER / "_C.so")

_TORCH_HAS_CUDA = torch.backends.cuda.is_built()
_HAS_TRITON = importlib.util.find_spec("triton") is not None

# The packed matmuls, decoding and the forwards of norms and convolution run on CUDA C++ where a toolkit was found when
# the package was built, and on Triton otherwise; the rest on Triton, but for what the CUDA library takes of the scan.
_PACKED_BACKEND = _SCAN_BACKEND = None
if _TORCH_HAS_CUDA:
    if (_FOLDER / "_C_cuda.so").is_file():
        torch.ops.load_library(_FOLDER / "_C_cuda.so")
        _PACKED_BACKEND = "CUDA C++"
    if _HAS_TRITON:
        from bitkernels import triton as _triton

        _triton.register_scan()
        _SCAN_BACKEND = "Triton"
        if _PACKED_BACKEND is None:
            _triton.register_packed()
            _PACKED_BACKEND = "Triton"


def build_info() -> dict[str, str]:
    """What was built and what serves which device, as printed by ``bitkernels info``.

    Returns:
        Names and values: versions of bitkernels, torch and Python; the CPU path chosen at run time;
        what runs packed matmuls and scans on CUDA tensors (``"not available"`` says why).
    """
    import bitkernels
    from bitkernels import host

    if not _TORCH_HAS_CUDA:
        missing = "not available (this torch is built without CUDA)"
    else:
        missing = "not available (Triton is not installed)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible"
    return {
        "bitkernels": bitkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CPU path": host.cpu_features()["path"],
        "CUDA library": "built" if (_FOLDER / "_C_cuda.so").is_file() else "not built (no CUDA toolkit was found)",
        "packed matmuls on CUDA": _PACKED_BACKEND or missing,
        "scan on CUDA": _SCAN_BACKEND or missing,
        "CUDA device": device,
    }
