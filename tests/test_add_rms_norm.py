import pytest
import torch
from helpers import TOLERANCE, assert_close, check_compile, check_cuda_graph, noncontiguous, opcheck, wide

import bitkernels
from bitkernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5,), (1, 1), (3, 31), (2, 7, 48), (0, 9), (40, 2560)]


def inputs(shape, device, dtype):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    residual, update, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    return residual.to(device, acc), update.to(device, dtype), weight.to(device)


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_sum(shape, dtype, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is for CPUs")
    residual, update, weight = inputs(shape, device, dtype)
    residual_ref, update_ref, weight_ref = wide(residual.clone(), update, weight)
    y = bitkernels.add_rms_norm(residual, update, weight, dtype, 1e-2)
    y_ref = reference.add_rms_norm(residual_ref, update_ref, weight_ref, torch.float64, 1e-2)
    assert y.dtype == dtype
    assert_close("y", y, y_ref)
    assert_close("residual", residual, residual_ref)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_an_update_the_residual_stays(dtype, device):
    residual, _, weight = inputs((6, 33), device, dtype)
    before = residual.clone()
    y = bitkernels.add_rms_norm(residual, None, weight, dtype)
    assert_close("y", y, reference.add_rms_norm(*wide(before), None, *wide(weight), torch.float64))
    assert torch.equal(residual, before)


def test_noncontiguous(device):
    """Every other position, and leading axes without a common stride: the sum lands in the argument."""
    residual, update, weight = inputs((4, 3, 40), device, torch.bfloat16)
    expected = residual.clone()
    y = bitkernels.add_rms_norm(expected, update, weight, torch.bfloat16)
    for strided in (noncontiguous(residual), residual.transpose(0, 1).clone().transpose(0, 1)):
        got = bitkernels.add_rms_norm(strided, noncontiguous(update), noncontiguous(weight), torch.bfloat16)
        assert torch.equal(got, y)
        assert torch.equal(strided, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(2, 4, dtype=torch.bfloat16)}, "residual must be torch.float32, got torch.bfloat16"),
        ({"residual": torch.zeros(())}, "residual must have at least one dimension"),
        ({"update": torch.zeros(2, 5)}, r"update must be of shape \[2, 4\], got \[2, 5\]"),
        ({"update": torch.zeros(2, 4, dtype=torch.int32)}, "update must be float32, bfloat16 or float16"),
        ({"weight": torch.zeros(5)}, r"weight must be of shape \[4\], got \[5\]"),
        ({"weight": torch.zeros(4, dtype=torch.int32)}, "weight must be a floating-point tensor"),
        ({"dtype": torch.int8}, "dtype must be float32, bfloat16 or float16, got torch.int8"),
    ],
)
def test_errors(change, message, device):
    arguments = {"residual": torch.zeros(2, 4), "update": torch.zeros(2, 4), "weight": torch.zeros(4)}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (arguments | change).items()}
    with pytest.raises(ValueError, match=message):
        bitkernels.add_rms_norm(**{"dtype": torch.float32, **arguments})


def test_opcheck_compile_and_graph(device):
    residual, update, weight = inputs((3, 32), device, torch.bfloat16)
    op = torch.ops.bitkernels.add_rms_norm.default
    opcheck(op, (residual.clone(), update, weight, torch.bfloat16), grad=False)
    opcheck(op, (residual.clone(), None, weight, torch.float32), grad=False)

    def both(residual, update, weight):
        residual = residual.clone()
        return bitkernels.add_rms_norm(residual, update, weight, torch.bfloat16), residual

    check_compile(both, (residual, update, weight))
    if device == "cuda":
        check_cuda_graph(lambda *a: both(*a)[0], (residual, update, weight))


def test_long_rows_are_as_accurate(device):
    residual, update, weight = inputs((2, 20_000), device, torch.float32)
    ref = wide(residual, update, weight)
    y = bitkernels.add_rms_norm(residual, update, weight, torch.float32)
    assert_close("y", y, reference.add_rms_norm(*ref, torch.float64), TOLERANCE[torch.float32])
