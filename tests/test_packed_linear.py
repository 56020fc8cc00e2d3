import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TOLERANCE,
    assert_close,
    cancellation,
    check_compile,
    check_compiled_gradients,
    check_cuda_graph,
    noncontiguous,
    opcheck,
    rms_error,
    wide,
)

import bitkernels
from bitkernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    batch: tuple[int, ...]  # leading dimensions of x
    N: int
    K: int
    scales: str = "column"
    bias: bool = False

    def __str__(self):
        batch = "x".join(map(str, self.batch)) or "vector"
        return f"{batch}-N{self.N}-K{self.K}-{self.scales}{'-bias' if self.bias else ''}"


CASES = [
    Case((1,), 1, 1),
    Case((), 5, 33),
    Case((1,), 64, 31),
    Case((1,), 65, 32, bias=True),
    Case((1,), 127, 33, "row"),
    Case((1,), 256, 1024, "single", bias=True),
    Case((2, 3), 70, 100, bias=True),
    Case((8,), 100, 257, "row", bias=True),
    Case((9,), 33, 513),
    Case((17,), 130, 96, "single"),
    Case((33,), 129, 768, bias=True),
    Case((130,), 200, 320, "row"),
    Case((257,), 72, 129, bias=True),
    Case((40,), 264, 1024, "row"),
    Case((70,), 136, 2056, bias=True),
    Case((600,), 200, 96),
    Case((2,), 4100, 640, "row"),
    Case((3,), 300, 1024, bias=True),
    Case((4,), 129, 384),
    Case((6,), 90, 1024),  # blocks of a cluster have less than a step of K each
    Case((7,), 300, 2560, "row", bias=True),  # two steps and a half
    Case((8,), 5000, 1280),
    Case((24,), 200, 8192, bias=True),
    Case((40,), 9000, 288),  # more tiles than any card has processors
    Case((20,), 24, 16500),  # more columns than scales are tabulated for
    Case((0,), 5, 33),
    Case((3,), 0, 33),
    Case((3,), 5, 0, bias=True),
]


def inputs(case, device, dtype, requires_grad=False):
    """x, w_packed, alpha, beta, bias."""
    shape = {"column": (case.K,), "row": (case.N, 1), "single": (1,)}[case.scales]
    x = torch.randn(*case.batch, case.K, device=device).to(dtype)
    w_packed = bitkernels.pack_sign(torch.randn(case.N, case.K, device=device))
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    alpha = torch.rand(shape, device=device, dtype=scale_dtype) + 0.1
    beta = torch.randn(shape, device=device, dtype=scale_dtype) * 0.1
    bias = torch.randn(case.N, device=device, dtype=scale_dtype) if case.bias else None
    for t in (x, alpha, beta, bias):
        if t is not None:
            t.requires_grad_(requires_grad)
    return x, w_packed, alpha, beta, bias


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case, dtype, device):
    args = inputs(case, device, dtype)
    y = bitkernels.packed_linear(*args)
    assert y.dtype == dtype
    assert_close("y", y, reference.packed_linear(*wide(*args)))


def test_more_rows_than_fit_at_once(device):
    x, w_packed, alpha, beta, _ = inputs(Case((2,), 220_000, 128), device, torch.bfloat16)
    some = slice(None, None, 97)
    y = bitkernels.packed_linear(x, w_packed, alpha, beta)
    assert_close("y", y[:, some], reference.packed_linear(*wide(x, w_packed[some], alpha, beta)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 5, 8, 13, 16, 32, 64, 100, 300, 3000])
def test_as_accurate_as_the_dense_layer(M, dtype, device):
    """The error is no larger than that of F.linear with W~ rounded to the activations' dtype."""
    case = Case((M,), 640, 512, "column")
    x, w_packed, alpha, beta, _ = inputs(case, device, dtype)
    dense = reference.unpack_sign(w_packed, case.K) * alpha + beta
    ref = F.linear(*wide(x, dense))
    error = rms_error(bitkernels.packed_linear(x, w_packed, alpha, beta), ref)
    assert error <= (1e-5 if dtype == torch.float32 else 1.1 * rms_error(F.linear(x, dense.to(dtype)), ref))

    # Where W~ is exact in the dtype, rounding the scaled activations may cost a little.
    alpha, beta = alpha.to(dtype).float(), torch.zeros_like(beta)
    dense = reference.unpack_sign(w_packed, case.K) * alpha
    ref = F.linear(*wide(x, dense))
    error = rms_error(bitkernels.packed_linear(x, w_packed, alpha, beta), ref)
    assert error <= (1e-5 if dtype == torch.float32 else 1.5 * rms_error(F.linear(x, dense.to(dtype)), ref))


@pytest.mark.parametrize("scales", ["column", "row", "single"])
@pytest.mark.parametrize("K", [1, 31, 32, 33, 200])
def test_one_hot_activations_return_the_matrix(K, scales, device):
    """Signs times powers of two are exact in every dtype, so the decoded matrix must be too."""
    w = torch.randn(37, K, device=device)
    shape = {"column": (K,), "row": (37, 1), "single": (1,)}[scales]
    alpha = 2.0 ** torch.randint(-3, 4, shape, device=device)
    y = bitkernels.packed_linear(
        torch.eye(K, device=device), bitkernels.pack_sign(w), alpha, torch.zeros(shape, device=device)
    )
    assert torch.equal(y, (torch.where(w >= 0, 1.0, -1.0) * alpha).t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, dtype, device):
    args = inputs(case, device, dtype, requires_grad=True)
    wide_args = wide(*args)
    y = bitkernels.packed_linear(*args)
    ref = reference.packed_linear(*wide_args)
    grad = torch.randn_like(y)
    y.backward(grad)
    ref.backward(grad.double().cpu())
    for name, t, t_ref in zip(("x", "w_packed", "alpha", "beta", "bias"), args, wide_args, strict=True):
        if t is not None and t.is_floating_point():
            assert t.grad.dtype == t.dtype
            # Scale gradients are sums of products of tensors in the activations' dtype; a single scale's may cancel.
            tolerance = TOLERANCE[dtype]
            if case.scales == "single" and name in ("alpha", "beta"):
                one, zero = torch.ones_like(wide_args[2]), torch.zeros_like(wide_args[2])
                scales = (one, zero) if name == "alpha" else (zero, one)
                terms = reference.packed_linear(*wide_args[:2], *scales) * grad.double().cpu()
                tolerance *= cancellation(terms)
            assert_close(f"d{name}", t.grad, t_ref.grad, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", ["column", "row", "single"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 33, 31), (17, 100, 72), (40, 257, 520), (300, 64, 129)])
def test_gradient_of_x_alone(M, N, K, scales, dtype, device):
    x, w_packed, alpha, beta, _ = inputs(Case((M,), N, K, scales), device, dtype)
    grad = torch.randn(M, N, device=device).to(dtype)
    dx, dalpha, dbeta = torch.ops.bitkernels.packed_linear_backward(grad, x, w_packed, alpha, beta, False)
    assert dalpha.numel() == dbeta.numel() == 0
    leaf, *rest = wide(x.requires_grad_(), w_packed, alpha, beta)
    reference.packed_linear(leaf, *rest, None).backward(grad.double().cpu())
    assert_close("dx", dx, leaf.grad)


@pytest.mark.parametrize("scales", ["column", "row", "single"])
def test_gradcheck(scales):
    x, w_packed, alpha, beta, bias = inputs(Case((3,), 5, 35, scales, True), "cpu", torch.float64, requires_grad=True)

    def function(x, alpha, beta, bias):
        return bitkernels.packed_linear(x, w_packed, alpha, beta, bias)

    assert torch.autograd.gradcheck(function, (x, alpha, beta, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 40])
def test_noncontiguous(M, dtype, device):
    x, w_packed, alpha, beta, bias = inputs(Case((M,), 50, 70, bias=True), device, dtype)
    expected = bitkernels.packed_linear(x, w_packed, alpha, beta, bias)
    words = w_packed.view(torch.int32).t().contiguous().t().view(torch.uint32)
    views = (noncontiguous(x), words, noncontiguous(alpha), noncontiguous(beta), noncontiguous(bias))
    assert torch.equal(bitkernels.packed_linear(*views), expected)


@pytest.mark.parametrize("M", [1, 7, 100])
def test_same_bits_every_run(M, device):
    args = inputs(Case((M,), 300, 500, bias=True), device, torch.bfloat16)
    first = bitkernels.packed_linear(*args)
    grads = [torch.ops.bitkernels.packed_linear_backward(first, *args[:4]) for _ in range(2)]
    assert torch.equal(bitkernels.packed_linear(*args), first)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("M", "N", "K", "scales"),
    [
        (96, 10576, 2560, "column"),  # fewer tiles than processors: a block helps with two
        pytest.param(300, 2000, 8000, "row", marks=pytest.mark.memcheck),  # three blocks help with one
        (1024, 10576, 2560, "single"),  # more tiles: equal shares
        (1000, 10571, 2557, "column"),
    ],
)
def test_tiles_cut_between_blocks(M, N, K, scales):
    """Blocks that wait for each other's sums: right, the same bits, and no deadlock beside another such call."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    args = inputs(Case((M,), N, K, scales, bias=True), "cuda", torch.bfloat16)
    x, w_packed, alpha, beta, bias = args
    if torch.cuda.get_device_properties(0).multi_processor_count == 132 and "warpgroup" in (
        plan := bitkernels.explain(M, N, K, torch.bfloat16, scales=scales, device="cuda")
    ):
        assert "cut between blocks" in plan
    y = bitkernels.packed_linear(*args)
    dense = bitkernels.unpack_sign(w_packed, K).double() * alpha + beta
    assert_close("y", y, F.linear(x.double(), dense, bias.double()))
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    again = []
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            again.append(bitkernels.packed_linear(*args))
    torch.cuda.synchronize()
    assert all(torch.equal(a, y) for a in again)


@pytest.mark.parametrize("scales", ["column", "row"])
def test_opcheck(scales, device):
    args = inputs(Case((3, 4), 20, 40, scales, bias=True), device, torch.float32)
    opcheck(torch.ops.bitkernels.packed_linear.default, args)
    grad = torch.randn(3, 4, 20, device=device)
    opcheck(torch.ops.bitkernels.packed_linear_backward.default, (grad, *args[:4]), grad=False)


def test_compile_and_cuda_graph(device):
    args = inputs(Case((4,), 20, 40, bias=True), device, torch.float32)
    check_compile(bitkernels.packed_linear, args)
    if device == "cuda":
        check_cuda_graph(bitkernels.packed_linear, args)


def test_compiled_training(device):
    args = inputs(Case((4,), 20, 40, bias=True), device, torch.float32, requires_grad=True)
    tensors = [a for a in args if a.requires_grad]

    def loss(*args):
        return bitkernels.packed_linear(*args).square().sum()

    check_compiled_gradients(loss, args, tensors, "inductor")


PAIRS = [  # every tile; rows of K that end within a pair, a word and a box, and rows longer than a block holds
    Case((300,), 3000, 2049, "row", bias=True),
    Case((190,), 3000, 2049, "row"),
    Case((600,), 3000, 2049, "single"),
    Case((260,), 4104, 2081, bias=True),
    Case((500,), 4104, 2081),
    Case((700,), 4104, 2081),
    Case((130,), 9001, 2561),
    Case((260,), 9001, 2561, bias=True),
    Case((300,), 9001, 2561),
    Case((400,), 5000, 4096),
    Case((150,), 9000, 9000, "row"),
    Case((260,), 9000, 9000),
    Case((300,), 3000, 17000, "row"),
]


@pytest.mark.gpu
@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs_of_columns(case, dtype):
    """Sums and differences in fp16: right, whatever the size of a token, and infinities and NaN stay in theirs."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    x, w_packed, alpha, beta, bias = inputs(case, "cuda", dtype)
    M = case.batch[0]
    plan = bitkernels.explain(M, case.N, case.K, dtype, scales=case.scales, device="cuda")
    if torch.cuda.get_device_properties(0).multi_processor_count == 132 and "warpgroup" in plan:
        assert "pairs of columns" in plan
    sizes = torch.logspace(-30, 30, M, 10) if dtype == torch.bfloat16 else torch.logspace(-3, 2, M, 10)
    x = (x * sizes.cuda()[torch.randperm(M), None]).to(dtype)
    x[5] = 0
    dense = bitkernels.unpack_sign(w_packed, case.K).double() * alpha + beta
    y, ref = bitkernels.packed_linear(x, w_packed, alpha, beta), F.linear(x.double(), dense)
    fits = ref.abs().amax(1) < torch.finfo(dtype).max
    scale = ref.square().mean(1, keepdim=True).sqrt().clamp(min=1e-37)
    assert_close("y", (y.double() / scale)[fits], (ref / scale)[fits], TOLERANCE[dtype])
    x = torch.randn_like(x)
    expected = bitkernels.packed_linear(x, w_packed, alpha, beta, bias)
    if bias is not None:
        assert_close("y", expected, F.linear(x.double(), dense, bias.double()))
    x[3, case.K // 2], x[7, 0] = torch.inf, torch.nan
    y = bitkernels.packed_linear(x, w_packed, alpha, beta, bias)
    assert not y[3].isfinite().any()
    assert y[7].isnan().all()
    rest = torch.ones(M, dtype=torch.bool)
    rest[[3, 7]] = False
    assert torch.equal(y[rest], expected[rest])


@pytest.mark.gpu
@pytest.mark.parametrize("scales", ["column", "row"])
@pytest.mark.parametrize(("M", "K"), [(600, 2049), (700, 2080)])
def test_pairs_return_the_matrix(M, K, scales):
    """Each column alone: one-hot activations, many of them, with alpha and beta that fp16 holds."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    _, w_packed, alpha, beta, _ = inputs(Case((M,), 3000, K, scales), "cuda", torch.bfloat16)
    alpha, beta = alpha.bfloat16().float(), torch.zeros_like(beta)
    columns = torch.randperm(K, device="cuda")[:M]
    x = F.one_hot(columns, K).bfloat16()
    dense = bitkernels.unpack_sign(w_packed, K) * alpha
    assert torch.equal(bitkernels.packed_linear(x, w_packed, alpha, beta), dense.T[columns].bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [8, 32, 64, 96, 100, 128, 200, 256])
@pytest.mark.parametrize(("N", "K"), [(2560, 5120), (6448, 1536), (1536, 3072), (2048, 4096)])
def test_place_in_a_batch_does_not_matter(dtype, M, N, K):
    """A batch-invariant engine relies on it: a token's bits are the same wherever in the batch it is."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    x, w_packed, alpha, beta, _ = inputs(Case((M,), N, K), "cuda", dtype)
    y = bitkernels.packed_linear(x, w_packed, alpha, beta)
    dense = bitkernels.unpack_sign(w_packed, K).double() * alpha + beta
    assert_close("y", y, F.linear(x.double(), dense))
    assert torch.equal(bitkernels.packed_linear(x.roll(M // 2 + 1, 0), w_packed, alpha, beta), y.roll(M // 2 + 1, 0))


@pytest.mark.gpu
def test_large_tensors_use_64_bit_addresses():
    """M * K and M * N beyond 2^31 elements: the last rows are the first ones again."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    K, N, M = 4096, 4096, 2**31 // 4096 + 64
    x, w_packed, alpha, beta, _ = inputs(Case((64,), N, K), "cuda", torch.bfloat16)
    tall = torch.empty(M, K, dtype=torch.bfloat16, device="cuda")
    tall[:64] = tall[-64:] = x
    tall[64:-64] = 0
    y = bitkernels.packed_linear(tall, w_packed, alpha, beta)
    ref = reference.packed_linear(*wide(x, w_packed, alpha, beta, None))
    assert_close("y", y[:64], ref)
    assert_close("y", y[-64:], ref)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(2, 41)}, "packed_linear: (w_packed|alpha) .*"),
        ({"x": torch.randn(2, 40, dtype=torch.complex64)}, "packed_linear: x must be float32.*Complex"),
        ({"x": torch.ones(2, 40, dtype=torch.int32)}, "packed_linear: x must be float32.*Int"),
        ({"w_packed": torch.zeros(20, 1, dtype=torch.uint32)}, "packed_linear: w_packed must have .* 2 words.*got 1"),
        ({"w_packed": torch.zeros(20, 2, dtype=torch.int32)}, "packed_linear: w_packed must be UInt32, got Int"),
        ({"w_packed": torch.zeros(20, dtype=torch.uint32)}, r"packed_linear: w_packed must be .*got \[20\]"),
        ({"alpha": torch.ones(39)}, r"packed_linear: alpha .*got \[39\]"),
        ({"beta": torch.ones(20, 1)}, r"packed_linear: beta .*got \[20, 1\]"),
        ({"bias": torch.ones(21)}, r"packed_linear: bias .*got \[21\]"),
        ({"alpha": torch.ones(40, dtype=torch.int64)}, "packed_linear: alpha .*Long"),
    ],
)
def test_bad_input(change, words):
    names = ("x", "w_packed", "alpha", "beta", "bias")
    good = dict(zip(names, inputs(Case((2,), 20, 40, bias=True), "cpu", torch.float32), strict=True))
    with pytest.raises(ValueError, match=words):
        bitkernels.packed_linear(**{**good, **change})


@pytest.mark.gpu
def test_mixed_devices():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    x, w_packed, alpha, beta, bias = inputs(Case((2,), 20, 40, bias=True), "cuda", torch.float32)
    with pytest.raises(ValueError, match="packed_linear: alpha must be on the device"):
        bitkernels.packed_linear(x, w_packed, alpha.cpu(), beta, bias)


_FIRST_CALLS = """
import time, torch, bitkernels
w_packed = bitkernels.pack_sign(torch.randn(10576, 2560, device="cuda"))
alpha = torch.rand(2560, device="cuda")
for M in (1, 3, 8, 17, 100, 700, 4096):
    x = torch.randn(M, 2560, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    bitkernels.packed_linear(x, w_packed, alpha, alpha)
    torch.cuda.synchronize()
    print(time.perf_counter() - begin)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_first_call_of_a_shape_takes_less_than_two_seconds():
    """Nothing is tuned at run time. A process of its own: in this one the kernels may have run before."""
    if bitkernels.build_info()["CUDA library"] != "built":
        pytest.skip("Triton compiles its kernels at their first call")
    done = subprocess.run([sys.executable, "-c", _FIRST_CALLS], capture_output=True, text=True, check=True)
    assert max(map(float, done.stdout.split())) < 2
