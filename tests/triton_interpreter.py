"""A pytest plugin: the Triton kernels run under the interpreter and serve CPU tensors.

The interpreter must be on before triton is imported, so it takes a process of its own, which ``run_tests``
starts: the tests of an operator then try its Triton kernels on a machine without a GPU.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def _missing() -> str | None:
    """Why the interpreter cannot be used here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # It calls int() on arrays of one element, which newer NumPy refuses.
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 5):
        return "the interpreter of triton 3.6 needs numpy below 2.5"
    return None


def _release(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


MISSING = _missing()


def run_tests(register: str, *selection: str) -> None:
    """Runs tests in a fresh process in which ``bitkernels.triton.<register>("CPU")`` has been called."""
    if MISSING:
        pytest.skip(MISSING)
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "BITKERNELS_INTERPRET": register,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    # It computes in Python, so a second process uses a second core.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-p", "triton_interpreter"]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run([*command, *selection], cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]


def fix_bfloat16() -> None:
    """The interpreter truncates to bfloat16 and multiplies its bit patterns in ``tl.dot``; a GPU does neither."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding_convert(value, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(value, source, target, mode)
        bits = np.frombuffer(value.tobytes(), dtype=np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(bits.view(np.float32)), 0x7FC0, nearest).astype(np.uint16).reshape(value.shape)

    def float_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return dot(self, a, b, *rest)

    interpreter._convert_float = rounding_convert
    interpreter.InterpreterBuilder.create_dot = float_dot


if os.environ.get("TRITON_INTERPRET") == "1":
    fix_bfloat16()


def pytest_sessionstart(session):
    import bitkernels  # noqa: F401  (loads the operators that the kernels replace)
    from bitkernels import triton

    getattr(triton, os.environ["BITKERNELS_INTERPRET"])("CPU")
    from bitkernels.triton import causal_conv1d

    # A token takes the interpreter milliseconds: short sequences are to have several strips.
    causal_conv1d.FORWARD_STRIP = causal_conv1d.BACKWARD_STRIP = 8
