"""The NumPy half against a few lines of NumPy."""

import subprocess
import sys

import numpy as np
import pytest

from bitkernels import host

SHAPES = ((1, 1), (5, 16), (63, 31), (65, 33), (130, 517))
TOKENS = (1, 3, 9, 33)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def path(request):
    try:
        host.force_cpu_path(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    host.force_cpu_path("")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pack(codes, bits, padding):
    """[N, K] codes -> uint32 words, the first code in the lowest bits."""
    per_word = 32 // bits
    N, K = codes.shape
    padded = np.full((N, -(-K // per_word) * per_word), padding, np.uint32)
    padded[:, :K] = codes
    shifts = np.arange(per_word, dtype=np.uint32) * bits
    return np.bitwise_or.reduce(padded.reshape(N, padded.shape[1] // per_word, per_word) << shifts, axis=-1)


def signs(w):
    return np.where(w >= 0, 1.0, -1.0).astype(np.float32)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def error(out, ref):
    return np.sqrt(np.mean((out - ref) ** 2) / np.mean(ref**2))


def test_does_not_load_torch():
    code = (
        "import sys\n"
        "import numpy as np\n"
        "from bitkernels import host\n"
        "ones = np.ones((2, 3), np.float32)\n"
        "y = host.packed_linear(ones, host.pack_sign(ones), ones[0], ones[0])\n"
        "assert y.tolist() == [[6, 6], [6, 6]]\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("N", "K"), [*SHAPES, (0, 5), (5, 0)])
def test_pack_and_unpack(rng, N, K):
    w = normal(rng, N, K)
    w[: N // 2, : K // 2] = 0
    w_packed = host.pack_sign(w)
    np.testing.assert_array_equal(w_packed, pack(w >= 0, 1, 0))
    np.testing.assert_array_equal(host.unpack_sign(w_packed, K), signs(w))
    codes = pack(np.clip(np.rint(w), -1, 1) + 1, 2, 1)
    np.testing.assert_array_equal(host.pack_ternary(w), codes)
    np.testing.assert_array_equal(host.unpack_ternary(codes, K), np.clip(np.rint(w), -1, 1))


@pytest.mark.parametrize("axis", ["column", "column2d", "row", "single"])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_packed_linear(path, rng, N, K, axis):
    shape = {"column": (K,), "column2d": (1, K), "row": (N, 1), "single": (1,)}[axis]
    w, alpha, beta, bias = normal(rng, N, K), normal(rng, *shape) + 2, normal(rng, *shape), normal(rng, N)
    weight = alpha.astype(np.float64) * signs(w) + beta
    for M in TOKENS:
        x = normal(rng, M, K)
        y = host.packed_linear(x, host.pack_sign(w), alpha, beta, bias)
        assert y.dtype == np.float32
        assert error(y, x.astype(np.float64) @ weight.T + bias) < 1e-5


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_ternary_linear(path, rng, N, K):
    q, bias = rng.integers(-1, 2, (N, K)).astype(np.float32), normal(rng, N)
    w_packed, scale = host.pack_ternary(q), np.float32(0.37)
    for M in TOKENS:
        x = normal(rng, M, K)
        y = host.ternary_linear(x, w_packed, scale, bias)
        assert error(y, x.astype(np.float64) @ q.T * float(scale) + bias) < 1e-5
        act_scale = np.float32(127) / np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-5))
        xq = np.clip(np.rint(x * act_scale), -128, 127)
        exact = (xq.astype(np.int64) @ q.T.astype(np.int64)).astype(np.float32) * (scale / act_scale) + bias
        np.testing.assert_array_equal(host.ternary_linear(x, w_packed, scale, bias, act_bits=8), exact)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(rng, num_threads):
    x, w_packed, alpha = normal(rng, 20, 300), host.pack_sign(normal(rng, 500, 300)), normal(rng, 300)
    one = host.packed_linear(x, w_packed, alpha, alpha, num_threads=1)
    np.testing.assert_array_equal(host.packed_linear(x, w_packed, alpha, alpha, num_threads=num_threads), one)


def test_leading_dimensions_and_strides(rng):
    w, alpha = normal(rng, 7, 40), normal(rng, 40)
    w_packed, x = host.pack_sign(w), normal(rng, 2, 3, 80)[..., ::2]
    y = host.packed_linear(x, w_packed, alpha, alpha)
    assert y.shape == (2, 3, 7)
    assert error(y, x @ (alpha * signs(w) + alpha).T) < 1e-5
    np.testing.assert_array_equal(host.packed_linear(x[0, 0], w_packed, alpha, alpha), y[0, 0])
    np.testing.assert_array_equal(host.pack_sign(np.asfortranarray(w)), w_packed)


@pytest.mark.parametrize(("M", "N", "K"), [(0, 5, 6), (5, 0, 6), (5, 6, 0)])
def test_empty(M, N, K):
    x, w, ones = np.ones((M, K), np.float32), np.ones((N, K), np.float32), np.ones(K, np.float32)
    bias = np.full(N, 2, np.float32)
    for y in (
        host.packed_linear(x, host.pack_sign(w), ones, ones, bias),
        host.ternary_linear(x, host.pack_ternary(w), 1.0, bias),
        host.ternary_linear(x, host.pack_ternary(w), 1.0, bias, act_bits=8),
    ):
        np.testing.assert_array_equal(y, np.full((M, N), 2))


F32 = np.ones((4, 40), np.float32)
WORDS = np.zeros((6, 2), np.uint32)
SCALE = np.ones(40, np.float32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: host.pack_sign(F32.astype(np.float64)), "pack_sign: w must be float32, got float64"),
        (lambda: host.pack_sign(F32[0]), r"pack_sign: w must be \[N, K\], got \[40\]"),
        (lambda: host.unpack_sign(WORDS, 65), "unpack_sign: w_packed must have .* = 3 words a row for K = 65, got 2"),
        (lambda: host.unpack_sign(WORDS, -1), "unpack_sign: K must not be negative, got -1"),
        (lambda: host.unpack_ternary(WORDS.astype(np.int32), 40), "w_packed must be uint32, got int32"),
        (lambda: host.packed_linear(F32.astype(int), WORDS, SCALE, SCALE), "x must be float32, got int64"),
        (lambda: host.packed_linear(F32, WORDS[0], SCALE, SCALE), r"w_packed must be \[N, ceil\(K/32\)\], got \[2\]"),
        (lambda: host.packed_linear(F32, WORDS, SCALE[:3], SCALE), r"alpha must be of shape .* got \[3\]"),
        (lambda: host.packed_linear(F32, WORDS, SCALE, SCALE[:1]), r"beta must have alpha's shape \[40\], got \[1\]"),
        (lambda: host.packed_linear(F32, WORDS, SCALE, SCALE, SCALE), r"bias must be of shape \[6\], got \[40\]"),
        (lambda: host.packed_linear(F32, WORDS, SCALE, SCALE, num_threads=0), "num_threads must be positive, got 0"),
        (lambda: host.ternary_linear(F32, WORDS, 1.0), "w_packed must have .* = 3 words a row for K = 40, got 2"),
        (lambda: host.ternary_linear(F32, WORDS, 1.0, act_bits=4), "act_bits must be None or 8, got 4"),
        (lambda: host.force_cpu_path("sse9"), "must be portable, avx2 or avx512, got sse9"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_cpu_features(path):
    report = host.cpu_features()
    assert report["path"] == path
    assert report["supported_paths"][0] == "portable"
    assert report["path"] in report["supported_paths"]
    assert report["threads"] >= 1
