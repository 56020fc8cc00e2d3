import pytest
import torch
from helpers import check_compile, check_cuda_graph, noncontiguous, opcheck

import bitkernels
from bitkernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (33,), (5, 1), (3, 31), (4, 32), (2, 3, 257), (2, 2560), (0, 7)], ids=str)
def test_equals_the_reference_to_the_bit(shape, dtype, device):
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    q, scale = bitkernels.quantize_int8(x)
    q_ref, scale_ref = reference.quantize_int8(x.cpu())
    assert torch.equal(q.cpu(), q_ref)
    assert torch.equal(scale.cpu(), scale_ref)


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 31), (4, 32), (2, 3, 257), (2, 2560), (0, 7)], ids=str)
def test_fake_quantisation_is_there_and_back_to_the_bit(shape, dtype, device):
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    q, scale = reference.quantize_int8(x.cpu())
    y = torch.ops.bitkernels.fake_quantize_int8(x)
    assert torch.equal(y.cpu(), (q.float() / scale.unsqueeze(-1)).to(dtype))
    opcheck(torch.ops.bitkernels.fake_quantize_int8.default, (x,), grad=False)


def test_ties_round_to_even_and_tiny_rows_use_the_floor(device):
    x = torch.tensor(
        [[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0, 0, 0, 0, 0, 0], [1e-6, 0, 0, 0, 0, -1e-6]], device=device
    )
    q, scale = bitkernels.quantize_int8(x)
    assert q[0].tolist() == [127, 0, 2, 2, 0, -2]
    assert scale[0].item() == 1.0
    assert q[1].tolist() == [0] * 6
    assert scale[1].item() == scale[2].item() == pytest.approx(127e5)


def test_noncontiguous(device):
    x = torch.randn(9, 70, device=device)
    for a, b in zip(bitkernels.quantize_int8(noncontiguous(x)), bitkernels.quantize_int8(x), strict=True):
        assert torch.equal(a, b)


def test_opcheck_compile_and_cuda_graph(device):
    x = torch.randn(3, 5, device=device)
    opcheck(torch.ops.bitkernels.quantize_int8.default, (x,), grad=False)
    check_compile(bitkernels.quantize_int8, (x,))
    if device == "cuda":
        check_cuda_graph(bitkernels.quantize_int8, (x,))


def test_bad_input():
    with pytest.raises(ValueError, match="quantize_int8: x must be float32.*Int"):
        bitkernels.quantize_int8(torch.ones(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="quantize_int8: x must have at least one dimension"):
        bitkernels.quantize_int8(torch.tensor(1.0))
