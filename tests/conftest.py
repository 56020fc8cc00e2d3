import os

# cuBLAS is deterministic only with a fixed workspace, which it reads when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import bitkernels  # noqa: F401


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN (and the largest integer), so an element nobody wrote shows. BITKERNELS_POISON=0: not."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = os.environ.get("BITKERNELS_POISON") != "0"
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
