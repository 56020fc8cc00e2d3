"""The sum into the residual and the norm of the next layer, against PyTorch's operators one after the other."""

import torch
import torch.nn.functional as F
from harness import Contender, device_of, nbytes, on_copies, verify

import bitkernels
from bitkernels import reference

WIDTHS = {"780M": 1536, "2.7B": 2560}


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("model", WIDTHS)
    metafunc.parametrize("M", [1, 2048, 16384] if cuda else [1, 512])


def one_by_one(residual, update, weight, dtype):
    residual = residual + update.float()
    return F.rms_norm(residual, residual.shape[-1:], weight).to(dtype), residual


def test_add_rms_norm(model, M, device, compare):
    dtype, K = torch.bfloat16, WIDTHS[model]
    residual, weight = torch.randn(M, K, device=device), torch.randn(K, device=device)
    update = torch.randn(M, K, device=device).to(dtype)
    wide = [t.double() for t in (residual, update, weight)]
    y = bitkernels.add_rms_norm(residual.clone(), update, weight, dtype)
    verify(y, reference.add_rms_norm(*wide, torch.float64))

    # Bytes: the residual read and written, the update once, y once.
    size = 2 * nbytes(residual) + nbytes(update, weight, y)
    ours = Contender("bitkernels", on_copies(bitkernels.add_rms_norm, residual, update, weight, dtype), size)
    peer = Contender("PyTorch", on_copies(one_by_one, residual, update, weight, dtype), size)
    compare(f"{model}, M={M}", ours, [peer], 6 * residual.numel(), shape=[M, K], dtype=str(dtype))
