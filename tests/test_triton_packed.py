"""The portable packed matmuls: the operators' own tests on them, and what only they have."""

import contextlib

import pytest
import torch
from triton_interpreter import MISSING, run_tests

needs_triton = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def test_under_the_interpreter():
    """Every kernel, tile and dtype; the cases that only repeat them at length are left to a GPU."""
    files = ["pack", "quantize_int8", "packed_linear", "ternary_linear", "sign_linear", "explain"]
    files = [f"test_{name}.py" for name in files]
    long = "N256 or 257 or 130 or N9000 or 640 or 1024 or 2048 or 8192"
    values = f"(test_value or round or scaled or bit or noncontiguous or int8_gradient) and not ({long})"
    values = f"({values}) or (test_weight_backward and not 300) or test_names_a_kernel"
    gradients = f"test_gradients and bfloat16 and not ({long})"
    accuracy = "as_accurate and (cpu-1-torch or cpu-5-torch) and float16"
    run_tests("register_packed", *files, "-k", f"cpu and (({values}) or ({gradients}) or ({accuracy}))")


def test_decode_steps_under_the_interpreter():
    """What serves a GPU in place of the fused steps is made of other operators."""
    few = "(test_in_step or test_out_step) and (K33 or W6) and not float16"
    run_tests("register_packed", "test_mamba2_step.py", "-k", f"cpu and ((test_slots and int64) or ({few}))")


@needs_triton
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(2, 40, dtype=torch.float64)}, "packed_linear: x must be float32.*float64"),
        ({"x": torch.ones(2, 41)}, r"packed_linear: alpha must be .*got \[40\]"),
        ({"w_packed": torch.zeros(20, 1, dtype=torch.uint32)}, "packed_linear: w_packed must have .* 2 words.*got 1"),
        (
            {"w_packed": torch.zeros(20, 2, dtype=torch.int32)},
            "packed_linear: w_packed must be uint32, got torch.int32",
        ),
        ({"beta": torch.ones(20, 1)}, r"packed_linear: beta must be of shape \[40\], got \[20, 1\]"),
        ({"bias": torch.ones(21)}, r"packed_linear: bias must be of shape \[20\], got \[21\]"),
        ({"alpha": torch.ones(40, dtype=torch.int64)}, "packed_linear: alpha must be of a floating-point type"),
        ({"x": torch.ones(2, 40, device="meta")}, "packed_linear: w_packed must be on the device"),
    ],
)
def test_bad_input(change, words):
    from bitkernels.triton.packed_linear import packed_linear

    good = {
        "x": torch.ones(2, 40),
        "w_packed": torch.zeros(20, 2, dtype=torch.uint32),
        "alpha": torch.ones(40),
        "beta": torch.ones(40),
    }
    with pytest.raises(ValueError, match=words):
        packed_linear(**{**good, **change})


@needs_triton
@pytest.mark.parametrize("M", [3, 64, 100])
@pytest.mark.parametrize(
    ("dtype", "transposed"),
    [(dtype, False) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)]
    + [(dtype, True) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    ids=str,
)
def test_compiles_for_a_gpu(M, dtype, transposed):
    """Compiled for sm_90 without a device, forward and backward; shared memory fits the GPUs that have least of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bitkernels.triton.packed_matmul import matmul_kernel, tile

    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}[dtype]
    output = "*bf16" if dtype == torch.int8 else pointer
    types = {"p_x": pointer, "p_w": "*i32", "p_y": output, "p_alpha": "*fp32", "p_beta": "*fp32", "p_sum": "*fp32"}
    types |= dict.fromkeys(["M", "J", "R", "words", "stride_scale"], "i32")
    if transposed:
        types |= {"p_gx": output, "p_dalpha": "*fp32", "p_dbeta": "*fp32"}
    options = tile(M, dtype)
    constants = {"BITS": 1, "TRANSPOSED": transposed} | {k: v for k, v in options.items() if k.startswith("B")}
    constants |= {name: None for name in matmul_kernel.arg_names if name not in types | constants}
    signature = {name: types.get(name, "constexpr") for name in matmul_kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(matmul_kernel.arg_names) if n in types}
    kernel = triton.compile(
        ASTSource(matmul_kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={k: v for k, v in options.items() if k.startswith("num_")} | {"enable_fp_fusion": True},
    )
    assert kernel.metadata.shared <= 99 * 1024


@needs_triton
def test_operators_run_on_the_device_of_their_first_tensor(monkeypatch):
    """Triton launches on the current device, whatever the tensors are on."""
    from bitkernels.triton.arguments import on_its_device

    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: entered.append(t) or contextlib.nullcontext())
    x = torch.ones(2)
    assert on_its_device(lambda none, x, *, eps: (none, x, eps))(None, x, eps=1) == (None, x, 1)
    assert len(entered) == 1
    assert entered[0] is x
