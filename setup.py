"""Builds the native libraries with CMake (CMakeLists.txt says what they are) and puts them into the package.

Environment: BITKERNELS_CUDA=ON|OFF|AUTO (default AUTO: where a CUDA toolkit is found),
BITKERNELS_CUDA_ARCHS="80;90a" (default: every supported architecture the toolkit knows), MAX_JOBS.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_backend"))
from backend import installed_torch  # noqa: E402


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    found = Path(spec.origin).parent if spec and spec.origin else installed_torch()
    if found is None:
        raise SystemExit("bitkernels: no torch found to build against; run `pip install torch` first")
    return found


class CMakeBuild(build_ext):
    """Configures and builds once; every library lands beside the Python files."""

    def run(self):
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        target = ROOT / "bitkernels" if self.editable_mode else Path(self.build_lib) / "bitkernels"
        target.mkdir(parents=True, exist_ok=True)
        subprocess.check_call([
            "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            # pip's isolated environment moves from one build to the next, and CMake remembers the old place.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DBITKERNELS_TORCH_DIR={torch_folder()}",
            f"-Dpybind11_DIR={self._pybind11_dir()}",
            f"-DBITKERNELS_CUDA={os.environ.get('BITKERNELS_CUDA', 'AUTO')}",
            f"-DBITKERNELS_CUDA_ARCHS={os.environ.get('BITKERNELS_CUDA_ARCHS', '')}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
        ])  # fmt: skip
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.check_call(["cmake", "--build", str(build_dir), "-j", jobs])
        subprocess.check_call(["cmake", "--install", str(build_dir)])

    @staticmethod
    def _pybind11_dir() -> str:
        import pybind11

        return pybind11.get_cmake_dir()

    def get_outputs(self):
        return []


setup(ext_modules=[Extension("bitkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
