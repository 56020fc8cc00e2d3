"""What the packed Triton operators share: argument checks, dense views, registration."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# Of N and K: a tile of 128 rows is then addressed by 32-bit offsets, and an int8 sum fits an int32.
MAX_SIZE = 2**24

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)


# Triton's functions of these names also serve kernels, and cost microseconds a call.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def fail(op: str, message: str) -> None:
    raise ValueError(f"{op}: {message}")


def check(holds: bool, op: str, message: str) -> None:
    if not holds:
        fail(op, message)


def check_float(op: str, argument: str, t: Tensor) -> None:
    check(t.dtype in ACTIVATIONS, op, f"{argument} must be float32, bfloat16 or float16, got {t.dtype}")


def check_device(op: str, argument: str, t: Tensor, first: Tensor) -> None:
    if t.device != first.device:
        fail(op, f"{argument} must be on the device of the first argument")


def check_scale(op: str, argument: str, t: Tensor, first: Tensor) -> None:
    """Scales and biases: any floating-point type, used as float32."""
    check_device(op, argument, t, first)
    check(t.is_floating_point(), op, f"{argument} must be of a floating-point type, got {t.dtype}")


def check_shape(op: str, argument: str, t: Tensor, expected: tuple[int, ...]) -> None:
    if t.shape != expected:  # the message is worth building only then: this runs at every call
        fail(op, f"{argument} must be of shape {list(expected)}, got {list(t.shape)}")


def check_packed(op: str, w_packed: Tensor, K: int, per_word: int) -> None:
    check(K < MAX_SIZE, op, f"K must be below {MAX_SIZE}, got {K}")
    check(w_packed.shape[0] < MAX_SIZE, op, f"N must be below {MAX_SIZE}, got {w_packed.shape[0]}")
    check(w_packed.dtype == torch.uint32, op, f"w_packed must be uint32, got {w_packed.dtype}")
    check(w_packed.dim() == 2, op, f"w_packed must be [N, ceil(K/{per_word})], got {list(w_packed.shape)}")
    words = -(-K // per_word)
    check(
        w_packed.shape[1] == words,
        op,
        f"w_packed must have ceil(K/{per_word}) = {words} words a row for K = {K}, got {w_packed.shape[1]}",
    )


def words_of(w_packed: Tensor) -> Tensor:
    """uint32 words as the contiguous int32 that arithmetic is defined for."""
    return w_packed.view(torch.int32).contiguous()


def rows_of(t: Tensor) -> Tensor:
    """[..., K] as contiguous [M, K]."""
    return t.contiguous().view(t.shape[:-1].numel(), t.shape[-1])


def vector(t: Tensor) -> Tensor:
    """Scales or a bias as contiguous float32."""
    return t.float().reshape(-1).contiguous()


def on_its_device(function: Callable) -> Callable:
    """``function`` with the device of its first tensor as the current one, on which Triton launches."""

    @functools.wraps(function)
    def call(*args, **named):
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
            return function(*args, **named)

    return call
