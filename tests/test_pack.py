import pytest
import torch
from helpers import check_compile, check_cuda_graph, noncontiguous, opcheck

import bitkernels
from bitkernels import reference

SIZES = [
    (0, 5),
    (5, 0),
    (1, 1),
    (3, 31),
    (3, 32),
    (3, 33),
    (7, 15),
    (7, 16),
    (7, 17),
    (65, 100),
    (2, 1000),
    (3, 2056),
    (3, 2060),
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def signs(n, k, dtype, device):
    w = torch.randn(n, k, device=device).to(dtype)
    w[..., ::7] = 0.0
    w[..., 1::7] = -0.0
    return w


def ternary(n, k, dtype, device):
    return torch.randint(-1, 2, (n, k), device=device).to(dtype)


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_sign_round_trip(n, k, dtype, device):
    w = signs(n, k, dtype, device)
    packed = bitkernels.pack_sign(w)
    assert torch.equal(packed.cpu().view(torch.int32), reference.pack_sign(w.cpu()).view(torch.int32))
    assert torch.equal(bitkernels.unpack_sign(packed, k, dtype), torch.where(w >= 0, 1, -1).to(dtype))


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_ternary_round_trip(n, k, dtype, device):
    w = ternary(n, k, dtype, device)
    packed = bitkernels.pack_ternary(w)
    assert torch.equal(packed.cpu().view(torch.int32), reference.pack_ternary(w.cpu()).view(torch.int32))
    assert torch.equal(bitkernels.unpack_ternary(packed, k, dtype), w)


def test_ternary_rounds_half_to_even_and_clips(device):
    w = torch.tensor([[-7.0, -1.5, -0.51, -0.5, 0.5, 0.51, 1.5, 9.0]], device=device)
    unpacked = bitkernels.unpack_ternary(bitkernels.pack_ternary(w), 8)
    assert unpacked.tolist() == [[-1, -1, -1, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ternary_of_a_scaled_matrix(dtype, device):
    w = (torch.randn(7, 70, device=device) * 3).to(dtype)
    scale = torch.full((1,), 1.7, device=device)
    packed = bitkernels.pack_ternary(w, scale)
    scaled = w.cpu().float() * (1.0 / scale.cpu())
    assert torch.equal(packed.cpu().view(torch.int32), reference.pack_ternary(scaled).view(torch.int32))
    with pytest.raises(ValueError, match=r"pack_ternary: scale must be of shape \[1\], got \[2\]"):
        bitkernels.pack_ternary(w, torch.ones(2, device=device))


def test_noncontiguous(device):
    w = signs(9, 70, torch.float32, device)
    for view in (noncontiguous(w), w.t().contiguous().t()):
        assert torch.equal(bitkernels.pack_sign(view).view(torch.int32), bitkernels.pack_sign(w).view(torch.int32))
        packed = bitkernels.pack_ternary(view)
        assert torch.equal(packed.view(torch.int32), bitkernels.pack_ternary(w).view(torch.int32))


def test_opcheck(device):
    w = signs(5, 37, torch.float32, device)
    ops = torch.ops.bitkernels
    opcheck(ops.pack_sign.default, (w,), grad=False)
    opcheck(ops.pack_ternary.default, (w,), grad=False)
    opcheck(ops.pack_ternary.default, (w, torch.ones(1, device=device)), grad=False)
    opcheck(ops.unpack_sign.default, (ops.pack_sign(w), 37), {"dtype": torch.bfloat16}, grad=False)
    opcheck(ops.unpack_ternary.default, (ops.pack_ternary(w), 37), {"dtype": torch.int8}, grad=False)


def test_compile_and_cuda_graph(device):
    def round_trip(w):
        return bitkernels.unpack_sign(bitkernels.pack_sign(w), 37), bitkernels.unpack_ternary(
            bitkernels.pack_ternary(w), 37
        )

    w = signs(5, 37, torch.float32, device)
    check_compile(round_trip, (w,))
    if device == "cuda":
        check_cuda_graph(round_trip, (w,))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bitkernels.pack_sign(torch.randn(3)), r"pack_sign: w .*\[3\]"),
        (lambda: bitkernels.pack_sign(torch.zeros(3, 4, dtype=torch.int64)), "pack_sign: w .*"),
        (lambda: bitkernels.pack_ternary(torch.zeros(3, 4, dtype=torch.int64)), "pack_ternary: w .*"),
        (lambda: bitkernels.unpack_sign(torch.zeros(3, 1), 4), "unpack_sign: w_packed .*"),
        (lambda: bitkernels.unpack_sign(torch.zeros(3, 1, dtype=torch.uint32), 33), "unpack_sign: w_packed .*"),
        (lambda: bitkernels.unpack_sign(torch.zeros(3, 1, dtype=torch.uint32), -1), "unpack_sign: K .*-1"),
        (lambda: bitkernels.unpack_ternary(torch.zeros(3, 1, dtype=torch.uint32), 17), "unpack_ternary: w_packed .*"),
        (lambda: bitkernels.unpack_ternary(torch.zeros(3, dtype=torch.uint32), 17), "unpack_ternary: w_packed .*"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
