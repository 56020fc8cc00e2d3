"""The package itself: what loads what, and what was built."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bitkernels


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_numpy_half_never_loads_torch():
    code = "import sys, bitkernels; from bitkernels import host; print('torch' in sys.modules)"
    assert run_python(code) == "False"


@pytest.mark.parametrize(
    "code",
    [
        "import bitkernels; bitkernels.packed_linear",
        "import torch, bitkernels; torch.ops.bitkernels.packed_linear",
        "from bitkernels.packed_linear import packed_linear; import bitkernels",
        "import bitkernels.nn, bitkernels",
    ],
)
def test_a_function_wins_over_the_module_of_its_name(code):
    assert run_python(f"{code}; print(callable(bitkernels.packed_linear))") == "True"


def test_every_public_name_exists():
    for name in bitkernels.__all__:
        assert getattr(bitkernels, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = bitkernels.no_such_name


def test_build_info_names_what_serves_each_device():
    info = bitkernels.build_info()
    assert info["torch"] == torch.__version__
    assert info["CPU path"] in ("avx512", "avx2", "portable")
    if torch.backends.cuda.is_built():
        assert info["packed matmuls on CUDA"] in ("CUDA C++", "Triton")
    else:
        assert "built without CUDA" in info["packed matmuls on CUDA"]


def operator(name):
    return getattr(torch.ops.bitkernels, name.removeprefix("bitkernels::")).default


def test_every_operator_has_a_schema_with_a_fake():
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bitkernels::")]
    operators = [name for name in operators if "Tensor" in str(operator(name)._schema).split("->")[1]]
    assert len(operators) >= 20
    for name in operators:
        assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None, name


def test_generating_loads_no_compiler():
    """Which would take seconds before the first token."""
    code = """
import sys
from bitkernels.checkpoint import load_checkpoint
from bitkernels.data import shipped_model
next(load_checkpoint(shipped_model(), "cpu").model.stream([[1, 2, 3]], max_new_tokens=2))
print([name for name in ("torch._dynamo", "torch._inductor", "sympy", "triton") if name in sys.modules])
"""
    assert run_python(code) == "[]"


@pytest.mark.parametrize("first", ["bitkernels", "bitkernels.packed_linear", "bitkernels.add_rms_norm"])
def test_what_serves_gpus_loads_whatever_is_imported_first(first, tmp_path):
    """With a torch that has CUDA and no library for it: the operators import Triton's, which must not wait for them."""
    pytest.importorskip("triton")
    folder = Path(bitkernels.__file__).parent
    (tmp_path / "bitkernels").mkdir()
    for path in folder.iterdir():
        if path.name not in ("_C_cuda.so", "data"):
            (tmp_path / "bitkernels" / path.name).symlink_to(path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
torch.backends.cuda.is_built = lambda: True
import {first}
from bitkernels import _ops
print(_ops._PACKED_BACKEND, _ops._SCAN_BACKEND)
"""
    assert run_python(code) == "Triton Triton"
