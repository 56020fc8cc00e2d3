from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TOLERANCE,
    assert_close,
    check_compile,
    check_compiled_gradients,
    check_cuda_graph,
    noncontiguous,
    opcheck,
    rms_error,
    wide,
)
from triton_interpreter import MISSING, run_tests

import bitkernels
from bitkernels import reference
from bitkernels.distill_loss import LOGITS_AT_ONCE, OBJECTIVES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    batch: tuple[int, ...]
    K: int
    V: int
    teacher_K: int | None = None  # None: the teacher's logits are given

    def __str__(self):
        return f"{'x'.join(map(str, self.batch)) or 'one'}-{self.K}-{self.V}-teacher{self.teacher_K}"


CASES = [
    Case((), 5, 7),
    Case((3,), 1, 1),
    Case((2, 3), 16, 33, 9),
    Case((33,), 20, 300),
    Case((5,), 8, 9000, 12),  # rows of several blocks
]


def inputs(case, device, dtype, objective, head_dtype=None):
    torch.manual_seed(0)
    hidden = torch.randn(*case.batch, case.K).to(dtype)
    head = torch.randn(case.V, case.K).to(head_dtype or dtype)
    tensors = {"hidden": hidden, "head": head}
    if objective == "next_token":
        tensors["targets"] = torch.randint(case.V, case.batch)
    elif case.teacher_K is None:
        tensors["teacher_logits"] = torch.randn(*case.batch, case.V).to(dtype) * 3
    else:
        tensors["teacher_hidden"] = torch.randn(*case.batch, case.teacher_K).to(dtype)
        tensors["teacher_head"] = torch.randn(case.V, case.teacher_K).to(dtype)
    for name in ("hidden", "head"):
        tensors[name] = tensors[name].to(device).requires_grad_()
    return {name: t.to(device) for name, t in tensors.items()}


def wide_inputs(tensors):
    return dict(zip(tensors, wide(*tensors.values()), strict=True))


def plain_gradients(tensors, objective, scale):
    """Of a linear layer in hidden's dtype and the loss of its logits in float32."""
    t = {name: t.detach().cpu() for name, t in tensors.items()}
    hidden, head = (t[name].to(t["hidden"].dtype).requires_grad_() for name in ("hidden", "head"))
    teacher = t.get("teacher_logits")
    if "teacher_hidden" in t:
        teacher = F.linear(t["teacher_hidden"], t["teacher_head"])
    # The identity as a head: the loss of the logits themselves.
    logits, identity = F.linear(hidden, head).float(), torch.eye(head.shape[0])
    loss = reference.distill_loss(
        logits, identity, None if teacher is None else teacher.float(), targets=t.get("targets"), objective=objective
    )
    return dict(zip(("hidden", "head"), torch.autograd.grad(loss * scale, (hidden, head)), strict=True))


def check(tensors, objective, scale=1.0):
    """Losses within the tolerance of their dtype; gradients too, or as accurate as the plain loss's.

    Logits rounded to 16 bits change a probability by as much as they are wrong, which is more than one rounding.
    """
    leaves = wide_inputs(tensors)
    plain = plain_gradients(tensors, objective, scale)
    loss = bitkernels.distill_loss(**tensors, objective=objective)
    ref = reference.distill_loss(**leaves, objective=objective)
    dtype = tensors["hidden"].dtype
    assert loss.dtype == torch.float32
    assert_close("loss", loss, ref, TOLERANCE[dtype])
    (loss * scale).backward()
    (ref * scale).backward()
    for name in ("hidden", "head"):
        assert tensors[name].grad.dtype == tensors[name].dtype
        # Absolute where the gradient is nothing but rounding: a vocabulary of one.
        if leaves[name].grad.abs().max() > 0:
            tolerance = max(TOLERANCE[dtype], 1.1 * rms_error(plain[name], leaves[name].grad))
            assert_close(f"d{name}", tensors[name].grad, leaves[name].grad, tolerance)
        else:
            assert tensors[name].grad.abs().max() == 0


@pytest.mark.memcheck
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case, dtype, objective, device):
    check(inputs(case, device, dtype, objective), objective, scale=2.5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunks_and_their_remainder(objective, device, monkeypatch):
    """As in training: activations in bf16, the head's latent weight and its gradient in fp32."""
    monkeypatch.setitem(LOGITS_AT_ONCE, device, 10 * 300)
    check(inputs(CASES[3], device, torch.bfloat16, objective, torch.float32), objective)
    check(inputs(CASES[3], device, torch.float32, objective), objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective):
    tensors = inputs(Case((2, 2), 3, 5, 4), "cpu", torch.float64, objective)
    hidden, head = tensors.pop("hidden"), tensors.pop("head")
    function = lambda hidden, head: bitkernels.distill_loss(hidden, head, **tensors, objective=objective)  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, head))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_gradient_or_none(objective, device):
    """Each gradient alone has the bits it has with the other, and the loss those it has without gradients."""
    tensors = inputs(CASES[2], device, torch.float32, objective)
    loss = bitkernels.distill_loss(**tensors, objective=objective)
    both = torch.autograd.grad(loss, [tensors["hidden"], tensors["head"]])
    with torch.no_grad():
        assert torch.equal(bitkernels.distill_loss(**tensors, objective=objective), loss)
    for name, other, expected in (("hidden", "head", both[0]), ("head", "hidden", both[1])):
        alone = {**tensors, other: tensors[other].detach()}
        (grad,) = torch.autograd.grad(bitkernels.distill_loss(**alone, objective=objective), alone[name])
        assert torch.equal(grad, expected)


def test_no_tokens(device):
    tensors = inputs(Case((0,), 4, 6), device, torch.float32, "kl")
    loss = bitkernels.distill_loss(**tensors, objective="kl")
    loss.backward()
    assert loss == 0
    assert tensors["hidden"].grad.shape == (0, 4)
    assert tensors["head"].grad.abs().max() == 0


def test_teacher_without_some_tokens(device):
    tensors = inputs(CASES[3], device, torch.float32, "kl")
    tensors["teacher_logits"][:, 5:40] = float("-inf")
    for objective in ("cross_entropy", "kl"):
        loss = bitkernels.distill_loss(**tensors, objective=objective)
        assert_close("loss", loss, reference.distill_loss(**wide_inputs(tensors), objective=objective))


@pytest.mark.parametrize("value", [2.0**12, -(2.0**12)])
def test_large_logits(value, device):
    tensors = inputs(CASES[3], device, torch.float32, "cross_entropy")
    with torch.no_grad():  # integers: the products are exact, and the logits as large as they are
        tensors["hidden"].copy_(value * torch.randint(-3, 4, tensors["hidden"].shape))
        tensors["head"].copy_(torch.randint(-3, 4, tensors["head"].shape))
        tensors["teacher_logits"].add_(value)
    check(tensors, "cross_entropy")


def test_noncontiguous(device):
    for objective in OBJECTIVES:
        tensors = inputs(CASES[2], device, torch.float32, objective)
        spread = {name: noncontiguous(t.detach()) for name, t in tensors.items()}
        out = bitkernels.distill_loss(**spread, objective=objective)
        torch.testing.assert_close(out, bitkernels.distill_loss(**tensors, objective=objective).detach())


def test_same_bits_every_run(device):
    results = []
    for _ in range(2):
        tensors = inputs(CASES[4], device, torch.bfloat16, "cross_entropy")
        loss = bitkernels.distill_loss(**tensors)
        results.append([loss, *torch.autograd.grad(loss, [tensors["hidden"], tensors["head"]])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_leaves_the_operator_alone(device):
    tensors = inputs(CASES[2], device, torch.float32, "kl")
    expected = bitkernels.distill_loss(**tensors, objective="kl")
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(bitkernels.distill_loss(**tensors, objective="kl"), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_opcheck(objective, device):
    tensors = inputs(CASES[2], device, torch.float32, objective)
    names = ("hidden", "head", "teacher_logits", "teacher_hidden", "teacher_head", "targets")
    args = (*(tensors.get(name) for name in names), objective, True, True)
    opcheck(torch.ops.bitkernels.distill_loss.default, args, grad=False)
    torch.library.opcheck(torch.ops.bitkernels.distill_loss.default, args)  # hidden and head take gradients


def test_compile_and_cuda_graph(device):
    tensors = inputs(CASES[3], device, torch.float32, "kl")
    args = [tensors["hidden"], tensors["head"], tensors["teacher_logits"]]

    def loss(hidden, head, teacher):
        return bitkernels.distill_loss(hidden, head, teacher, objective="kl") * 2

    check_compile(loss, [a.detach() for a in args])
    check_compiled_gradients(loss, args, args[:2])
    if device == "cuda":
        check_cuda_graph(loss, [a.detach() for a in args])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_memory():
    """At most a quarter of the plain loss's peak, inputs excluded, at 16384 tokens and a vocabulary of 32000."""
    hidden, teacher_hidden = (torch.randn(16384, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    head, teacher_head = (torch.randn(32000, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    hidden.requires_grad_()
    head.requires_grad_()

    def plain():
        target = (teacher_hidden @ teacher_head.t()).float().softmax(-1)
        return torch.nn.functional.cross_entropy((hidden @ head.t()).float(), target)

    def peak(loss):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss(), [hidden, head])
        return torch.cuda.max_memory_allocated() - before

    fused = lambda: bitkernels.distill_loss(hidden, head, teacher_hidden=teacher_hidden, teacher_head=teacher_head)  # noqa: E731
    assert peak(fused) <= peak(plain) / 4


def test_triton_under_the_interpreter():
    run_tests("register_scan", "interpreted_loss.py")


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_compiles_for_a_gpu(objective):
    """Compiled for sm_90 without a device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bitkernels.triton.distill_loss import row_losses_kernel

    types = {"p_logits": "*bf16", "p_losses": "*fp32", "V": "i32", "stride_t_m": "i32", "stride_t_v": "i32"}
    types |= {"stride_g": "i32"} | ({"p_targets": "*i64"} if objective == "next_token" else {"p_teacher": "*bf16"})
    constants = {"TEACHER": objective != "next_token", "KL": objective == "kl", "GRAD": True, "BLOCK": 4096}
    constants |= {name: None for name in row_losses_kernel.arg_names if name not in types | constants}
    signature = {name: types.get(name, "constexpr") for name in row_losses_kernel.arg_names}
    kernel = triton.compile(
        ASTSource(row_losses_kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}
    )
    assert "ptx" in kernel.asm


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.ones(2, 8, dtype=torch.int32)}, "hidden must be of a floating-point type, got torch.int32"),
        ({"head": torch.ones(5, 9)}, r"head must be \[V, 8\] with V > 0, got \[5, 9\]"),
        ({"teacher_logits": None}, "objective 'cross_entropy' needs teacher_logits, or teacher_hidden and"),
        ({"teacher_logits": torch.ones(2, 6)}, r"teacher_logits must be \[2, 5\], got \[2, 6\]"),
        ({"teacher_head": torch.ones(5, 8)}, "teacher_logits and teacher_hidden with teacher_head exclude each other"),
        ({"targets": torch.ones(2, dtype=torch.int64)}, "targets belong to objective 'next_token'"),
        ({"objective": "next_token"}, "targets must be given for objective 'next_token'"),
        ({"objective": "mse"}, "objective must be one of cross_entropy, kl, next_token, got 'mse'"),
        (
            {"objective": "next_token", "targets": torch.ones(2, dtype=torch.int64)},
            "objective 'next_token' takes no teacher",
        ),
        (
            {"objective": "next_token", "teacher_logits": None, "targets": torch.ones(3, dtype=torch.int64)},
            r"targets must be \[2\], got \[3\]",
        ),
        (
            {"teacher_logits": None, "teacher_hidden": torch.ones(2, 3), "teacher_head": torch.ones(5, 4)},
            r"teacher_head must be \[5, 3\], got \[5, 4\]",
        ),
    ],
)
def test_bad_input(change, words, device):
    good = {"hidden": torch.ones(2, 8), "head": torch.ones(5, 8), "teacher_logits": torch.ones(2, 5)}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in {**good, **change}.items()}
    with pytest.raises(ValueError, match=f"distill_loss: {words}"):
        bitkernels.distill_loss(**arguments)
