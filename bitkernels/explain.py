"""``explain``: which kernel a packed matmul takes."""

from typing import Literal

import torch

from bitkernels import _ops  # noqa: F401  (loads the operators)


def explain(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    weights: Literal["binary", "ternary"] = "binary",
    scales: Literal["column", "row", "single"] = "column",
    act_bits: int | None = None,
    device: torch.device | str | None = None,
) -> str:
    """Which kernel and tile :func:`bitkernels.packed_linear` or :func:`bitkernels.ternary_linear` takes.

    Asks the function that also chooses for a call, and launches nothing. Where a call is handed to a slower kernel than
    others of its size, the text says why.

    Args:
        M: tokens, the product of all dimensions of x but the last.
        N: rows of the weights (out_features).
        K: columns of the weights (in_features).
        dtype: of x; contiguous tensors as torch allocates them are assumed.
        weights: "binary" (``packed_linear``) or "ternary" (``ternary_linear``).
        scales: of binary weights, by the shape of alpha: "column" [K], "row" [N, 1] or "single" [1].
        act_bits: of ternary weights' activations, None or 8.
        device: where the tensors are; default: a GPU where there is one.

    Returns:
        A line of text.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    like = torch.empty(0, dtype=dtype, device=device)
    if weights == "binary":
        if act_bits is not None:
            raise ValueError(f"explain: act_bits must be None for binary weights, got {act_bits}")
        return torch.ops.bitkernels.explain_packed_linear(like, M, N, K, scales)
    if weights != "ternary":
        raise ValueError(f"explain: weights must be binary or ternary, got {weights!r}")
    return torch.ops.bitkernels.explain_ternary_linear(like, M, N, K, act_bits)
