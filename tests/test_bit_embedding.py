import pytest
import torch
from helpers import TOLERANCE, assert_close, check_compile, opcheck, wide

import bitkernels
from bitkernels import reference

SHAPES = [((1,), 1, 1), ((3,), 7, 33), ((2, 5), 50, 64), ((0,), 5, 8), ((4, 33), 300, 96)]


def inputs(shape, vocab, width, device, dtype, requires_grad=False):
    """ids, weight, norm_weight, norm_bias."""
    ids = torch.randint(0, vocab, shape, device=device)
    weight = torch.randn(vocab, width, device=device, dtype=dtype)
    norm_weight = torch.rand(width, device=device, dtype=dtype) + 0.5
    norm_bias = torch.randn(width, device=device, dtype=dtype) * 0.1
    for t in (weight, norm_weight, norm_bias):
        t.requires_grad_(requires_grad)
    return ids, weight, norm_weight, norm_bias


@pytest.mark.parametrize(("shape", "vocab", "width"), SHAPES, ids=str)
def test_value_and_gradients(shape, vocab, width, device):
    args = inputs(shape, vocab, width, device, torch.float32, requires_grad=True)
    wide_args = wide(*args)
    y = bitkernels.bit_embedding(*args)
    ref = reference.bit_embedding(*wide_args)
    # Rounding to int8 may differ where a value sits within fp32 rounding of a tie; one step is absmax / 127.
    step = ref.detach().abs().amax(-1, keepdim=True) / 127
    difference = (y.detach().double().cpu() - ref.detach()).abs()
    assert (difference <= 1.001 * step).all()
    assert (difference > 1e-3 * step).float().mean() < 0.01 if y.numel() else True
    grad = torch.randn_like(y)
    y.backward(grad)
    ref.backward(grad.double().cpu())
    for name, t, t_ref in zip(("ids", "weight", "norm_weight", "norm_bias"), args, wide_args, strict=True):
        if t.is_floating_point():
            assert_close(f"d{name}", t.grad, t_ref.grad, 5 * TOLERANCE[torch.float32])


def test_values_lie_on_each_tokens_int8_grid(device):
    y = bitkernels.bit_embedding(*inputs((4, 33), 300, 96, device, torch.float32))
    grid = y * (127 / y.abs().amax(-1, keepdim=True))
    torch.testing.assert_close(grid, grid.round(), atol=1e-3, rtol=0)


def test_opcheck_and_compile(device):
    args = inputs((2, 5), 50, 64, device, torch.float32)
    opcheck(torch.ops.bitkernels.bit_embedding.default, args)
    check_compile(bitkernels.bit_embedding, args)


def test_bad_input():
    ids, weight, norm_weight, norm_bias = inputs((2, 5), 50, 64, "cpu", torch.float32)
    with pytest.raises(ValueError, match="bit_embedding: ids must be int32 or int64, got torch.float32"):
        bitkernels.bit_embedding(ids.float(), weight, norm_weight, norm_bias)
    with pytest.raises(ValueError, match=r"bit_embedding: norm_bias must be \[64\], got \[63\]"):
        bitkernels.bit_embedding(ids, weight, norm_weight, norm_bias[1:])
    with pytest.raises(IndexError):
        bitkernels.bit_embedding(ids + 50, weight, norm_weight, norm_bias)
