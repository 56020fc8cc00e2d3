"""Packing sign and ternary matrices into 32-bit words; docs/format.md defines the layout."""

import torch
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)


def pack_sign(w: Tensor) -> Tensor:
    """Packs the signs of a matrix, one bit each.

    Args:
        w: [N, K], any floating-point dtype. ``sign(0) = +1``, so a bit is 1 where ``w >= 0``.

    Returns:
        uint32 [N, ceil(K/32)], least significant bit first along K, padding bits 0.

    Raises:
        ValueError: ``w`` is not a matrix or not floating-point.
    """
    return torch.ops.bitkernels.pack_sign(w)


def unpack_sign(w_packed: Tensor, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of :func:`pack_sign`.

    Args:
        w_packed: uint32 [N, ceil(K/32)].
        K: number of columns.
        dtype: of the result.

    Returns:
        [N, K] of -1 and +1.

    Raises:
        ValueError: ``w_packed`` is not uint32, not a matrix, or its width does not fit ``K``.
    """
    return torch.ops.bitkernels.unpack_sign(w_packed, K, dtype=dtype)


def pack_ternary(w: Tensor, scale: Tensor | None = None) -> Tensor:
    """Packs a ternary matrix, two bits each.

    Args:
        w: [N, K], int8 or any floating-point dtype; rounded half to even and clipped to -1, 0, 1.
        scale: [1], what a weight of 1 stands for: packs ``w * (1 / scale)``, computed in float32 (float64 for a
            float64 ``w``). None stands for 1.

    Returns:
        uint32 [N, ceil(K/16)] of codes ``w + 1``, least significant first along K, padding code 1.

    Raises:
        ValueError: ``w`` is not a matrix or of another dtype, or ``scale`` is not one floating-point number.
    """
    return torch.ops.bitkernels.pack_ternary(w, scale)


def unpack_ternary(w_packed: Tensor, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of :func:`pack_ternary`.

    Args:
        w_packed: uint32 [N, ceil(K/16)].
        K: number of columns.
        dtype: of the result.

    Returns:
        [N, K] of -1, 0 and +1.

    Raises:
        ValueError: ``w_packed`` is not uint32, not a matrix, or its width does not fit ``K``.
    """
    return torch.ops.bitkernels.unpack_ternary(w_packed, K, dtype=dtype)


def _fake_pack(per_word):
    def fake(w, scale=None):
        return w.new_empty(w.shape[0], (w.shape[1] + per_word - 1) // per_word, dtype=torch.uint32)

    return fake


def _fake_unpack(w_packed, K, *, dtype):
    return w_packed.new_empty(w_packed.shape[0], K, dtype=dtype)


torch.library.register_fake("bitkernels::pack_sign")(_fake_pack(32))
torch.library.register_fake("bitkernels::pack_ternary")(_fake_pack(16))
torch.library.register_fake("bitkernels::unpack_sign")(_fake_unpack)
torch.library.register_fake("bitkernels::unpack_ternary")(_fake_unpack)
