"""Head and loss in one against the logits of all tokens: forward and backward, cross-entropy against a teacher."""

import torch
import torch.nn.functional as F
from harness import Contender, device_of, nbytes, on_copies, verify, with_gradients

import bitkernels

VOCABULARY = 32000
WIDTHS = {"780M": 1536, "2.7B": 2560}


def plain(hidden, head, teacher_hidden, teacher_head):
    target = F.linear(teacher_hidden, teacher_head).float().softmax(-1)
    return F.cross_entropy(F.linear(hidden, head).float(), target)


def ours(hidden, head, teacher_hidden, teacher_head):
    return bitkernels.distill_loss(hidden, head, teacher_hidden=teacher_hidden, teacher_head=teacher_head)


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("model", WIDTHS if cuda else ["780M"])
    metafunc.parametrize("M", [2048, 16384] if cuda else [256])


def test_distill_loss(model, M, device, compare):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    K = WIDTHS[model]
    inputs = [torch.randn(n, K, device=device).to(dtype) for n in (M, VOCABULARY, M, VOCABULARY)]
    for t in inputs[1::2]:
        t.mul_(K**-0.5)
    for t in inputs[:2]:
        t.requires_grad_()
    verify(ours(*inputs), plain(*inputs))

    # Bytes: the inputs once, the gradients once. Operations: two products for the logits, two for the gradients.
    size = nbytes(*inputs, *inputs[:2])
    contenders = [
        Contender(name, on_copies(with_gradients(function), *inputs), size)
        for name, function in (("bitkernels", ours), ("PyTorch", plain))
    ]
    columns = {"shape": [M, VOCABULARY, K], "dtype": str(dtype)}
    if device == "cuda":
        columns |= {f"{c.name} MB": round(peak(c.make()) / 1e6) for c in contenders}
    compare(f"{model}, M={M}", contenders[0], contenders[1:], 8 * M * VOCABULARY * K, **columns)


def peak(call) -> int:
    """Memory that a call needs beyond its inputs."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
