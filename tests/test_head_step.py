import pytest
import torch
from helpers import assert_close, check_compile, check_cuda_graph, noncontiguous, opcheck, wide

import bitkernels
from bitkernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, V, width. The first ones are one kernel on Hopper: fewer rows than blocks, rows that are no whole warps, rings of
# two and of eight stages.
HEADS = [(1, 1, 8), (1, 67, 264), (1, 1999, 2560), (1, 4001, 5120), (1, 3000, 512)]
SHAPES = [*HEADS, (1, 9, 33), (3, 64, 128), (0, 5, 8)]


def inputs(shape, device, weight_dtype):
    """residual, norm_weight and weight."""
    B, V, width = shape
    acc = torch.float64 if weight_dtype == torch.float64 else torch.float32
    residual, norm = torch.randn(B, width, device=device, dtype=acc), torch.rand(width, device=device, dtype=acc) + 0.5
    return 3 * residual, norm, torch.randn(V, width, device=device).to(weight_dtype)


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value(shape, dtype, device):
    args = inputs(shape, device, dtype)
    logits = bitkernels.head_step(*args, 1e-3)
    assert logits.dtype == dtype
    assert_close("logits", logits, reference.head_step(*wide(*args), 1e-3))


def test_float64():
    args = inputs((2, 7, 33), "cpu", torch.float64)
    assert_close("logits", bitkernels.head_step(*args), reference.head_step(*args))


def test_same_bits_every_run(device):
    args = inputs((1, 1999, 2560), device, torch.bfloat16)
    expected = bitkernels.head_step(*args)
    for _ in range(20 if device == "cuda" else 2):
        assert torch.equal(bitkernels.head_step(*args), expected)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_noncontiguous(which, device):
    args = list(inputs((1, 67, 264), device, torch.bfloat16))
    expected = bitkernels.head_step(*args)
    args[which] = noncontiguous(args[which])
    assert_close("logits", bitkernels.head_step(*args), expected.double())


def test_infinity_and_nan(device):
    """A bad weight stays in its row; a bad activation reaches all."""
    residual, norm, weight = inputs((1, 67, 264), device, torch.bfloat16)
    weight[3, 34], weight[5, 0] = torch.inf, torch.nan
    logits = bitkernels.head_step(residual, norm, weight)[0]
    assert logits[3].isinf()
    assert logits[5].isnan()
    assert logits.isfinite().sum() == 65
    residual[0, 9] = torch.nan
    assert not bitkernels.head_step(residual, norm, weight).isfinite().any()


def test_opcheck_and_compile(device):
    args = inputs((1, 20, 32), device, torch.bfloat16)
    opcheck(torch.ops.bitkernels.head_step.default, args, grad=False)
    check_compile(bitkernels.head_step, args)


def test_cuda_graph(device):
    if device == "cuda":
        check_cuda_graph(bitkernels.head_step, inputs((1, 1999, 2560), device, torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"residual": torch.ones(2, 8).half()}, "residual must be torch.float32, got torch.float16"),
        ({"residual": torch.ones(8)}, r"residual must be \[B, 8\], got \[8\]"),
        ({"norm_weight": torch.ones(7)}, r"norm_weight must be of shape \[8\], got \[7\]"),
        ({"norm_weight": torch.ones(8).int()}, "norm_weight must be a floating-point tensor"),
        ({"weight": torch.ones(4)}, r"weight must be \[V, width\], got \[4\]"),
        ({"weight": torch.ones(4, 8).int()}, "weight must be a floating-point tensor, got torch.int32"),
    ],
)
def test_bad_input(change, words):
    given = {"residual": torch.ones(2, 8), "norm_weight": torch.ones(8), "weight": torch.ones(4, 8)}
    with pytest.raises(ValueError, match=f"head_step: {words}"):
        bitkernels.head_step(**{**given, **change})
