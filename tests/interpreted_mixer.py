"""Values and gradients of the Mamba-2 kernels in Triton; run by test_triton_mixer.py under the interpreter."""

import importlib
import math

import pytest
import torch
from helpers import TOLERANCE, assert_close, rms_error, wide

import bitkernels
from bitkernels import reference
from bitkernels.triton import causal_conv1d as conv
from bitkernels.triton import gated_rms_norm as norm
from bitkernels.triton import ssd_hopper, ssd_scan_backward, ssd_states
from bitkernels.triton import ssd_scan as scan
from bitkernels.triton.launch import PLANS
from bitkernels.triton.ssd_step import ssd_step

mamba2_mixer = importlib.import_module("bitkernels.mamba2_mixer")
SCAN_ARGUMENTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
# Blocks are of 16 tokens in float32, of 64 in 16-bit types; changes inside and on the edge of blocks.
SEQ_IDX = [[0] * 10 + [1] * 23 + [0] + [2] * 16, [5] * 48 + [6] * 2]
CU_SEQLENS = [0, 0, 33, 34, 34, 66, 69]
ALL = {"D", "z", "dt_bias", "initial_states"}


def scan_inputs(given, dtype, B, T, H, P, N, G, sequences):
    """Slices of one projection, as the block has them, wherever the sizes allow."""
    widths = [H * P, H * P, G * N, G * N, H]
    z, x, b, c, dt = torch.randn(B, T, sum(widths)).to(dtype).split(widths, -1)
    inputs = {
        "x": x.unflatten(-1, (H, P)),
        "dt": dt - 1,
        "A": -4 * torch.rand(H) - 0.1,
        "B": b.unflatten(-1, (G, N)),
        "C": c.unflatten(-1, (G, N)),
        "D": torch.randn(H),
        "z": z.unflatten(-1, (H, P)),
        "dt_bias": torch.randn(H),
        "initial_states": torch.randn(sequences, H, P, N),
    }
    if "D2" in given:
        inputs["D"] = torch.randn(H, P)
    return {k: v if k in given or k not in ALL else None for k, v in inputs.items()}


def check_scan(given=(), dtype=torch.float32, T=50, B=2, H=4, P=20, N=24, G=2, limits=(0.0, None), softplus=True,
               seq_idx=None, cu_seqlens=None, tolerance=None, change=None):  # fmt: skip
    seq_idx = None if seq_idx is None else torch.tensor(seq_idx, dtype=torch.int32)
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    inputs = scan_inputs(given, dtype, B, T, H, P, N, G, sequences)
    inputs |= change or {}
    options = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens, "dt_softplus": softplus}
    low, high = limits
    y, final = scan.ssd_scan(**inputs, **options, dt_min=low, dt_max=high)

    leaves = {k: None if v is None else v.double().requires_grad_() for k, v in inputs.items()}
    limit = (low, math.inf if high is None else high)
    y_ref, final_ref = reference.ssd_scan(**leaves, **options, dt_limit=limit)
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    assert_close("y", y, y_ref, tolerance)
    assert_close("final_states", final, final_ref, tolerance)

    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    grads = ssd_hopper.ssd_scan_backward(dy, dfinal, **inputs, **options, dt_min=low, dt_max=high)
    torch.autograd.backward([y_ref, final_ref], [dy.double(), dfinal.double()])
    for name, grad in zip(SCAN_ARGUMENTS, grads, strict=True):
        if inputs[name] is None:
            assert grad.numel() == 0
        else:
            assert_close(f"gradient of {name}", grad, leaves[name].grad, tolerance)


@pytest.fixture(autouse=True)
def no_plans():
    """Plans are made of constants that tests change."""
    PLANS.clear()


@pytest.fixture(params=[1024, 1], ids=["chunks of one block", "whole sequences"])
def chunking(request, monkeypatch):
    monkeypatch.setattr(ssd_states, "SLOTS", request.param)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize(
    "case",
    [
        {"given": ALL},
        {"given": ALL | {"D2"}, "seq_idx": SEQ_IDX},
        {"given": ALL, "B": 1, "T": 69, "cu_seqlens": CU_SEQLENS},
    ],
    ids=["all", "seq_idx", "cu_seqlens"],
)
def test_scan(case):
    check_scan(**case)


def test_scan_of_what_must_be_given():
    check_scan(B=1, H=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scan_16bit(dtype):
    check_scan(ALL, dtype, T=70, B=1)


@pytest.mark.parametrize(
    "case",
    [
        {"T": 1, "H": 2, "B": 1},
        {"P": 72, "N": 136, "T": 33, "H": 2, "G": 1, "B": 1},
        {"P": 3, "N": 5, "H": 3, "G": 1, "B": 1},
        {"limits": (0.1, 0.8), "H": 2, "B": 1},
        {"softplus": False, "limits": (0.05, None), "H": 2, "B": 1},
        {"softplus": False, "H": 2, "B": 1},
        {"B": 1, "T": 40, "H": 2, "cu_seqlens": [0, 40]},
    ],
    ids=["one token", "several tiles", "below a tile", "limits", "no softplus", "negative steps", "one sequence"],
)
def test_scan_sizes(case):
    check_scan(ALL, **case)


def test_scan_two_blocks_a_chunk(monkeypatch):
    monkeypatch.setattr(ssd_states, "chunks_of", lambda programs, blocks: 2)
    check_scan(ALL, B=1, H=2, G=1)


@pytest.mark.parametrize(("chunks", "cu_seqlens"), [(1, CU_SEQLENS), (3, None)], ids=["cu_seqlens", "rows"])
def test_scan_part_by_part(chunks, cu_seqlens, monkeypatch):
    """The states of a chunk at a time, and of three."""
    monkeypatch.setattr(ssd_states, "SLOTS", 1024)
    monkeypatch.setattr(ssd_scan_backward, "STATE_BYTES", chunks * 2 * 2 * 20 * 24 * 4)
    check_scan(ALL, B=1 if cu_seqlens else 2, T=69, H=2, G=1, cu_seqlens=cu_seqlens)


def test_scan_strong_and_weak_decay():
    """Step sizes of 1e-3 and of 10: no infinity, no NaN, and the small gradients of strong decays hold."""
    dt = torch.cat([torch.full((1, 25, 4), -6.9), torch.full((1, 25, 4), 10.0)], 1) + torch.rand(1, 50, 4)
    check_scan({"D"}, B=1, change={"dt": dt, "A": torch.tensor([-1.0, -4.0, -16.0, -0.01])})


def test_scan_expanded_gradient():
    inputs = scan_inputs((), torch.float32, 1, 40, 2, 16, 16, 1, 1)
    dy = torch.ones(1, 40, 2, 16)
    expected = ssd_hopper.ssd_scan_backward(dy, None, **inputs)
    grads = ssd_hopper.ssd_scan_backward(torch.ones(()).expand_as(dy), None, **inputs)
    for grad, want in zip(grads, expected, strict=True):
        assert torch.equal(grad, want)


def test_scan_is_empty():
    inputs = scan_inputs(ALL, torch.float32, 2, 0, 2, 4, 4, 1, 2)
    y, final = scan.ssd_scan(**inputs)
    assert y.shape == (2, 0, 2, 4)
    assert torch.equal(final, inputs["initial_states"])
    grads = ssd_hopper.ssd_scan_backward(y, final, **inputs)
    assert torch.equal(grads[-1], final)
    assert not grads[2].any()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [(), ALL, ALL | {"D2"}], ids=["plain", "all", "D of H x P"])
def test_step(given, state_dtype):
    inputs = scan_inputs(given, torch.float32, 3, 1, 4, 20, 24, 2, 3)
    state = torch.randn(3, 4, 24, 20).to(state_dtype).transpose(2, 3)
    state_ref = state.double()
    token = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") and v is not None else v for k, v in inputs.items()}
    del token["initial_states"]
    y_ref = reference.ssd_step(state_ref, *wide(*token.values()), dt_softplus=True, dt_limit=(0.0, 2.0))
    y = ssd_step(state, **token, dt_softplus=True, dt_max=2.0)
    assert_close("y", y, y_ref)
    assert_close("state", state, state_ref)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [3, 20])
@pytest.mark.parametrize("scale", [1.0, 2.0**-17, 4e4])
def test_step_rounds_stochastically(state_dtype, N, scale):
    """The float32 arithmetic is one exact sum, so that the reference rounds the same numbers."""
    pool, B = scale * torch.randn(4, 2, 9, N), scale * torch.randn(3, 1, N)
    pool = pool.to(state_dtype)
    slots, held = torch.tensor([2, -1, 0]), [0, 2]
    seed, position = torch.tensor([-5, 1, 2**40 + 7]), torch.tensor([0, 1, 2**33 + 1])
    bits = reference.state_random_bits(seed, position, 2, 9, N)[held]
    expected = pool.clone()
    added = pool[slots[held]].float() + B[held, :, None]
    expected[slots[held]] = reference.round_stochastically(added, bits, state_dtype)
    ones = torch.ones(3, 2, 9)
    y = ssd_step(
        pool, ones, ones[..., 0], torch.zeros(2), B, B, state_indices=slots, seed=seed, position=position
    )  # fmt: skip
    assert torch.equal(pool, expected)
    assert not y[1].any()


CONV_SEQ_IDX = [[0] * 5 + [1] * 9 + [0] + [2] * 5, [5] * 16 + [6] * 4]
CONV_CASES = {
    "plain": {},
    "all": {"given": {"bias", "initial_state"}},
    "seq_idx": {"given": {"bias", "initial_state"}, "seq_idx": CONV_SEQ_IDX},
    "linear": {"given": {"bias"}, "silu": False, "width": 3},
    "one token": {"given": {"bias", "initial_state"}, "T": 1},
    "one tap": {"given": {"initial_state"}, "width": 1},
    "many channels": {"channels": 260, "T": 5},
    "bf16": {"given": {"bias", "initial_state"}, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", CONV_CASES.values(), ids=CONV_CASES)
def test_conv(case):
    given, dtype, T = case.get("given", ()), case.get("dtype", torch.float32), case.get("T", 20)
    channels, width, silu = case.get("channels", 12), case.get("width", 4), case.get("silu", True)
    seq_idx = torch.tensor(case["seq_idx"]) if "seq_idx" in case else None
    x = torch.randn(2, T, channels + 7).to(dtype)[..., 3:-4]
    weight = torch.randn(channels, width)
    bias = torch.randn(channels) if "bias" in given else None
    initial = torch.randn(2, width - 1, channels).to(dtype) if "initial_state" in given else None
    tensors = (x, weight, bias, initial)
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    y = conv.causal_conv1d(*tensors, seq_idx, None, silu)
    y_ref = reference.causal_conv1d(*leaves, seq_idx, None, "silu" if silu else None)
    assert_close("y", y, y_ref)

    dy = torch.randn(2, channels, T).to(dtype).mT
    y_ref.backward(dy.double())
    wider = torch.full((2, T, channels + 9), 7.0, dtype=dtype)
    grads = conv.causal_conv1d_backward(dy, *tensors, seq_idx, None, silu)
    conv.causal_conv1d_backward(dy, *tensors, seq_idx, None, silu, wider[..., 4:-5])
    assert torch.equal(wider[..., 4:-5], grads[0])
    assert (torch.cat([wider[..., :4], wider[..., -5:]], -1) == 7).all()
    for name, t, leaf, grad in zip(("x", "weight", "bias", "initial_state"), tensors, leaves, grads, strict=True):
        if t is None:
            assert grad.numel() == 0
        else:
            assert_close(f"gradient of {name}", grad, leaf.grad)


def test_mixer_gradients_lie_side_by_side(monkeypatch):
    """The parts write into one tensor as they do on a GPU, and the gradients are those of the CPU's operators."""
    monkeypatch.setattr(
        mamba2_mixer, "_writers", lambda device: (norm.gated_rms_norm_backward, conv.causal_conv1d_backward)
    )
    B, T, H, P, N = 2, 20, 2, 16, 16
    width, channels = H * P, H * P + 2 * N
    seq_idx = torch.tensor([[0] * 10 + [1] * 10, [0] * 20], dtype=torch.int32)
    leaves = [
        torch.randn(shape, requires_grad=True)
        for shape in ((B, T, width + channels + H), (channels, 4), (channels,), (H,), (H,), (H,), (width,))
    ]
    wide_leaves = wide(*leaves)
    results = []
    for x, conv_weight, conv_bias, dt_bias, A, D, norm_weight in (leaves, wide_leaves):
        mixer = bitkernels.mamba2_mixer if x.dtype == torch.float32 else reference.mamba2_mixer
        y = mixer(x, conv_weight, conv_bias, dt_bias, -A.exp(), D, norm_weight, seq_idx=seq_idx)
        results.append(y[0] if isinstance(y, tuple) else y)
    dy = torch.randn_like(results[0])
    results[0].backward(dy)
    results[1].backward(dy.double())
    for own, expected in zip(leaves, wide_leaves, strict=True):
        assert_close("gradient", own.grad, expected.grad)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("silu", [True, False])
def test_conv_step(width, silu):
    state, x = torch.randn(3, width - 1, 140), torch.randn(3, 280)[:, ::2]
    weight, bias = torch.randn(140, width), torch.randn(140)
    state_ref = state.double()
    y_ref = reference.causal_conv1d_step(state_ref, *wide(x, weight, bias), "silu" if silu else None)
    assert_close("y", conv.causal_conv1d_step(state, x, weight, bias, silu), y_ref)
    assert rms_error(state, state_ref) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "group_size"), [((2, 3, 20), None), ((7, 48), 12), ((1, 9000), None)])
def test_norm(shape, group_size, dtype, monkeypatch):
    monkeypatch.setattr(norm, "STRIPS", 4)  # fewer than rows
    x, z = (torch.randn(*shape, 2).to(dtype)[..., i] for i in range(2))
    weight = torch.randn(shape[-1])
    leaves = [t.double().requires_grad_() for t in (x, z, weight)]
    y_ref = reference.gated_rms_norm(*leaves, 1e-3, group_size)
    assert_close("y", norm.gated_rms_norm(x, z, weight, 1e-3, group_size), y_ref)
    dy = torch.randn(shape).to(dtype)
    y_ref.backward(dy.double())
    wider = torch.full((*shape[:-1], shape[-1] + 9), 7.0, dtype=dtype)
    grads = norm.gated_rms_norm_backward(dy, x, z, weight, 1e-3, group_size, wider[..., 4:-5])
    assert (torch.cat([wider[..., :4], wider[..., -5:]], -1) == 7).all()
    for name, grad, leaf in zip(("x", "z", "weight"), grads, leaves, strict=True):
        assert_close(f"gradient of {name}", grad, leaf.grad)
