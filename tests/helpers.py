"""What the tests share: one error metric, one tolerance per dtype, the four checks of every op."""

import torch
from torch import Tensor

# Of rms(out - ref) / rms(ref) against the float64 reference.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def rms_error(out: Tensor, ref: Tensor) -> float:
    """``rms(out - ref) / rms(ref)``; NaN and infinity count as infinite error."""
    assert out.shape == ref.shape, f"shape {list(out.shape)}, reference {list(ref.shape)}"
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    if ref.numel() == 0:
        return 0.0
    if not out.isfinite().all():
        return float("inf")
    difference, size = (out - ref).square().mean().sqrt().item(), ref.square().mean().sqrt().item()
    return difference / size if size > 0 else difference


def assert_close(name: str, out: Tensor, ref: Tensor, tolerance: float | None = None) -> None:
    tolerance = TOLERANCE[out.dtype] if tolerance is None else tolerance
    error = rms_error(out, ref)
    assert error <= tolerance, f"{name}: error {error:.3g} above {tolerance:.3g}"


def cancellation(terms: Tensor) -> float:
    """How far a sum's terms exceed their sum, by which its relative error exceeds theirs; at least 1."""
    terms = terms.detach().flatten()
    return max(1.0, (terms.square().sum().sqrt() / terms.sum().abs()).item())


def wide(*tensors):
    """Leaves in float64 on the CPU that take gradients where their sources do; integers and None as they are."""
    out = []
    for t in tensors:
        if isinstance(t, Tensor):
            grad = t.requires_grad
            t = t.detach().cpu()
            t = t.double().requires_grad_(grad) if t.is_floating_point() else t
        out.append(t)
    return out


def noncontiguous(t: Tensor) -> Tensor:
    """The same values at every other position of a larger buffer."""
    buffer = t.new_empty(*t.shape[:-1], t.shape[-1] * 2)
    buffer[..., ::2] = t
    return buffer[..., ::2]


def opcheck(op, args, kwargs=None, grad=True) -> None:
    """torch.library.opcheck on tensors that take gradients and on tensors that do not.

    Autograd registration cannot be checked for operators that change an argument in place (``grad=False``).
    """
    plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
    torch.library.opcheck(op, plain, kwargs or {})
    if grad:
        leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        torch.library.opcheck(op, leaves, kwargs or {})


def check_compile(function, args) -> None:
    """The compiled function, without graph breaks, returns the eager function's values."""
    eager = function(*args)
    compiled = torch.compile(function, fullgraph=True)(*args)
    torch.testing.assert_close(compiled, eager)


def check_compiled_gradients(loss, args, leaves, backend="aot_eager") -> None:
    """Compiled without graph breaks, the loss has the eager gradients."""
    eager = torch.autograd.grad(loss(*args), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*args), leaves)
    torch.testing.assert_close(compiled, eager)


def check_cuda_graph(function, args) -> None:
    """Captured and replayed, the function returns the eager function's bits."""
    eager = function(*args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*args)
    graph.replay()
    torch.testing.assert_close(captured, eager, rtol=0, atol=0)
