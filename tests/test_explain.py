import pytest
import torch
from typer.testing import CliRunner

import bitkernels
from bitkernels.cli import app

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("M", [1, 8, 9, 32, 33, 64, 128, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_names_a_kernel_for_every_call(M, dtype, device):
    for scales in ("column", "row", "single"):
        assert ": " in bitkernels.explain(M, 640, 257, dtype, scales=scales, device=device)
    for act_bits in (None, 8):
        assert ": " in bitkernels.explain(M, 640, 257, dtype, weights="ternary", act_bits=act_bits, device=device)


def test_names_the_path_in_use():
    for path in bitkernels.host.cpu_features()["supported_paths"]:
        torch.ops.bitkernels.cpu_path(path)
        try:
            assert path in bitkernels.explain(4, 64, 64, torch.float32, device="cpu")
            assert path in bitkernels.explain(4, 64, 64, weights="ternary", act_bits=8, device="cpu")
        finally:
            torch.ops.bitkernels.cpu_path("")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({"M": 512, "dtype": torch.float32}, "fp32 activations of up to 256 tokens"),
        ({"M": 512, "K": 20000}, "a table of column scales for K = 20000 is too large"),
        ({"M": 512, "K": 2561, "weights": "ternary"}, "K is no multiple of 8"),
        ({"M": 512, "N": 10576}, "sums and differences of pairs of columns"),
        ({"M": 512, "N": 2561}, "N is no multiple of 8"),
    ],
    ids=str,
)
def test_says_what_a_call_costs(call, why):
    if torch.cuda.get_device_capability() != (9, 0) or bitkernels.build_info()["CUDA library"] != "built":
        pytest.skip("speaks of the kernels of compute capability 9.0")
    assert why in bitkernels.explain(**{"N": 2560, "K": 2560, "device": "cuda", **call})


def test_command():
    result = CliRunner().invoke(app, ["explain", "8", "640", "256", "--format", "ternary", "--device", "cpu"])
    assert result.exit_code == 0
    assert result.output.strip() == bitkernels.explain(8, 640, 256, weights="ternary", device="cpu")
    result = CliRunner().invoke(app, ["explain", "0", "640", "256", "--device", "cpu"])
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"M": 0}, "explain: M, N and K must be positive, got 0, 20 and 40"),
        ({"scales": "rows"}, "explain: scales must be column, row or single, got rows"),
        ({"weights": "int4"}, "explain: weights must be binary or ternary, got 'int4'"),
        ({"act_bits": 8}, "explain: act_bits must be None for binary weights, got 8"),
        ({"weights": "ternary", "act_bits": 4}, "explain: act_bits must be None or 8, got 4"),
        ({"dtype": torch.int32}, "explain: dtype must be float32.*Int"),
    ],
    ids=str,
)
def test_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        bitkernels.explain(**{"M": 2, "N": 20, "K": 40, "device": "cpu", **change})
