"""Every instruction set of the CPU kernels against the reference, on one machine."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, rms_error

from bitkernels import reference

ops = torch.ops.bitkernels
PATHS = ("portable", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One and many panels of 64 rows, whole and ragged words (32 signs, 16 codes) and blocks of 16 words.
SHAPES = ((1, 1), (63, 31), (64, 32), (65, 33), (130, 517), (200, 1100))
# Blocks hold 1, 2 or 4 tokens in registers and up to 16 at once.
TOKENS = (1, 2, 7, 8, 9, 33, 130)
AXES = ("column", "row", "single")


@pytest.fixture(params=PATHS)
def path(request):
    try:
        ops.cpu_path(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    ops.cpu_path("")


def by_tokens(t):
    """The first rows of t, as many as each of TOKENS: the reference is computed once for all."""
    return ((M, t[:M]) for M in TOKENS)


def scales(axis, N, K):
    shape = {"column": (K,), "row": (N, 1), "single": (1,)}[axis]
    return torch.rand(shape) + 0.5, torch.randn(shape) * 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_packed_linear(path, N, K, dtype):
    w_packed, bias = reference.pack_sign(torch.randn(N, K)), torch.randn(N)
    alpha, beta = scales(AXES[(SHAPES.index((N, K)) + DTYPES.index(dtype)) % 3], N, K)
    x = torch.randn(max(TOKENS), K).to(dtype)
    ref = reference.packed_linear(x.double(), w_packed, alpha.double(), beta.double(), bias.double())
    for M, part in by_tokens(x):
        assert_close(f"M={M}", ops.packed_linear(part, w_packed, alpha, beta, bias), ref[:M])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 5), (65, 33), (517, 130)])
def test_packed_linear_backward(path, N, K, dtype, axis):
    w_packed = reference.pack_sign(torch.randn(N, K))
    alpha, beta = scales(axis, N, K)
    for M in (1, 9, 33):
        x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        dx, dalpha, dbeta = ops.packed_linear_backward(grad, x, w_packed, alpha, beta)
        wide = [t.double().requires_grad_() for t in (x, alpha, beta)]
        reference.packed_linear(wide[0], w_packed, *wide[1:]).backward(grad.double())
        assert_close("dx", dx, wide[0].grad)
        if axis == "column":
            assert_close("dalpha", dalpha, wide[1].grad)
            assert_close("dbeta", dbeta, wide[2].grad)
        else:
            assert dalpha.shape == dbeta.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_ternary_linear(path, N, K, dtype):
    w_packed = reference.pack_ternary(torch.randint(-1, 2, (N, K)))
    scale, bias = torch.rand(1) + 0.1, torch.randn(N)
    weight = scale.double() * reference.unpack_ternary(w_packed, K, torch.float64)
    x, grad = torch.randn(max(TOKENS), K).to(dtype), torch.randn(max(TOKENS), N).to(dtype)
    ref, ref_dx = x.double() @ weight.t() + bias.double(), grad.double() @ weight
    for M, part in by_tokens(x):
        assert_close(f"M={M}", ops.ternary_linear(part, w_packed, scale, bias), ref[:M])
        assert_close(f"dx, M={M}", ops.ternary_linear_backward(grad[:M], w_packed, scale, K), ref_dx[:M])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_int8_activations_to_the_bit(path, N, K, dtype):
    w_packed = reference.pack_ternary(torch.randint(-1, 2, (N, K)))
    scale, bias = torch.rand(1) + 0.1, torch.randn(N)
    x = torch.randn(max(TOKENS), K).to(dtype)
    ref = reference.ternary_linear(x, w_packed, scale, bias, 8)
    for M, part in by_tokens(x):
        assert torch.equal(ops.ternary_linear(part, w_packed, scale, bias, 8), ref[:M]), f"M={M}"


def test_int8_sums_do_not_saturate(path):
    K = 1 << 14
    x = torch.full((3, K), -1.0)
    x[1] = 1.0
    w_packed = reference.pack_ternary(torch.stack([torch.ones(K), -torch.ones(K)]))
    y = ops.ternary_linear(x, w_packed, torch.ones(1), None, 8)
    assert torch.equal(y, reference.ternary_linear(x, w_packed, torch.ones(1), None, 8))


def test_one_hot_activations_return_the_weights(path):
    N, K = 70, 45
    w = torch.randn(N, K)
    alpha, beta = scales("column", N, K)
    sign = torch.where(w >= 0, 1.0, -1.0)
    y = ops.packed_linear(torch.eye(K), reference.pack_sign(w), alpha, beta)
    assert torch.equal(y, (alpha * sign + beta).t())
    q = torch.randint(-1, 2, (N, K)).float()
    assert torch.equal(ops.ternary_linear(torch.eye(K), reference.pack_ternary(q), torch.ones(1)), q.t())


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_long_sums_stay_accurate(path, mean):
    N, K = 96, 8192
    x, w_packed = torch.randn(5, K) + mean, reference.pack_sign(torch.randn(N, K))
    alpha, beta = torch.rand(K), torch.zeros(K)
    y = ops.packed_linear(x, w_packed, alpha, beta)
    assert_close("y", y, reference.packed_linear(x.double(), w_packed, alpha.double(), beta.double()))


def test_bits_do_not_depend_on_threads(path):
    N, K, M = 300, 200, 50
    x, grad, w_packed = torch.randn(M, K), torch.randn(M, N), reference.pack_sign(torch.randn(N, K))
    alpha, beta = scales("column", N, K)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = ops.packed_linear(x, w_packed, alpha, beta)
            results.append((y, *ops.packed_linear_backward(grad, x, w_packed, alpha, beta)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Panels hold 64 rows, chunks 16 words of each: 512 signs or 256 ternary codes.
BORDERS = ((64, 511), (65, 513), (63, 255), (129, 257), (2, 1056))


def pack(op, N, K):
    if op == "packed_linear":
        return reference.pack_sign(torch.randn(N, K))
    return reference.pack_ternary(torch.randint(-1, 2, (N, K)))


def call(op, x, w_packed):
    """packed_linear with row scales, or ternary_linear."""
    N = w_packed.shape[0]
    if op == "packed_linear":
        return ops.packed_linear(x, w_packed, torch.full((N, 1), 0.5), torch.full((N, 1), 0.25))
    return ops.ternary_linear(x, w_packed, torch.full((1,), 0.5), None, 8 if op == "int8" else None)


@pytest.mark.parametrize("op", ["packed_linear", "ternary_linear", "int8"])
@pytest.mark.parametrize(("N", "K"), BORDERS)
def test_a_token_does_not_depend_on_the_others(path, N, K, op):
    w_packed = pack(op, N, K)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(129, K).to(dtype)
        alone = torch.cat([call(op, row[None], w_packed) for row in x])
        for M in (2, 3, 4, 5, 8, 9, 16, 17, 63, 64, 65, 128, 129):
            assert torch.equal(call(op, x[:M], w_packed), alone[:M]), f"M={M}, {dtype}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outlier", [10, 1000])
@pytest.mark.parametrize("op", ["packed_linear", "ternary_linear"])
def test_an_outlier_costs_no_accuracy(path, op, outlier, dtype):
    N, K = 256, 2560
    w_packed = pack(op, N, K)
    dense = call(op, torch.eye(K), w_packed).t()  # of values exact in every dtype
    x = torch.randn(4, K)
    x[:, 7] = outlier
    x = x.to(dtype)
    ref = F.linear(x.double(), dense.double())
    error = rms_error(call(op, x, w_packed), ref)
    assert error <= (1e-5 if dtype == torch.float32 else 1.1 * rms_error(F.linear(x, dense.to(dtype)), ref))


@pytest.mark.parametrize("exponent", [-110, -60, 60, 110])
@pytest.mark.parametrize("op", ["packed_linear", "ternary_linear"])
def test_powers_of_two_scale_results_exactly(path, op, exponent):
    x, w_packed = torch.randn(3, 100), pack(op, 70, 100)
    assert torch.equal(call(op, x * 2.0**exponent, w_packed), call(op, x, w_packed) * 2.0**exponent)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("op", ["packed_linear", "ternary_linear"])
def test_infinity_and_nan_stay_in_their_token(path, op, value):
    x, w_packed = torch.randn(4, 100), pack(op, 70, 100)
    expected = call(op, x, w_packed)
    x[2, 50] = value
    y = call(op, x, w_packed)
    assert torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])
    assert not y[2].isfinite().any()


@pytest.mark.parametrize("words", [1 << 14, (1 << 14) + 1])
@pytest.mark.parametrize("op", ["packed_linear", "ternary_linear"])
def test_sums_of_very_long_rows_do_not_overflow(path, op, words):
    """Every term as large as it can be and of one sign: integer sums reach their bounds."""
    K = words * (32 if op == "packed_linear" else 16)
    largest_mantissa = 2 - 2.0**-23
    x = torch.stack([torch.full((K,), largest_mantissa), torch.full((K,), -largest_mantissa)])
    ones = torch.ones(2, K)
    w_packed = reference.pack_sign(ones) if op == "packed_linear" else reference.pack_ternary(ones)
    scale = 0.75 if op == "packed_linear" else 0.5
    y = call(op, x, w_packed)
    assert_close("y", y, torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double() * K * largest_mantissa * scale)


@pytest.mark.parametrize("M", [1, 9])
@pytest.mark.parametrize("op", ["packed_linear", "ternary_linear", "int8"])
def test_bits_do_not_depend_on_threads_at_few_tokens(path, op, M):
    x, w_packed = torch.randn(M, 1000), pack(op, 777, 1000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(op, x, w_packed))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_unknown_path():
    with pytest.raises(ValueError, match="must be portable, avx2 or avx512, got sse9"):
        ops.cpu_path("sse9")


@pytest.mark.parametrize(("value", "words"), [("portable", "portable"), ("sse9", "BITKERNELS_CPU must be .*got sse9")])
def test_environment_variable(value, words):
    code = (
        "import torch, bitkernels\n"
        "try: print(torch.ops.bitkernels.cpu_path())\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "BITKERNELS_CPU": value}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.search(words, out.stdout)
