"""The names and signatures of other packages, for programs written against them."""

import math

from torch import Tensor

from bitkernels.ssd_scan import ssd_scan


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined`` on :func:`bitkernels.ssd_scan`.

    As there, ``cu_seqlens`` only says where the states of ``return_varlen_states`` are taken; what divides the scan
    into sequences is ``seq_idx``. To divide it by ``cu_seqlens``, with an initial state for each sequence, call
    ``ssd_scan``. Unlike there, the states of ``return_varlen_states`` are differentiable.

    Args:
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit: as of ``ssd_scan``.
        chunk_size: a hint; the result does not depend on it.
        cu_seqlens: int32 or int64 [S + 1], from 0 to T; needed and used only with ``return_varlen_states``.
        return_final_states: whether to return the states after the last token, [B, H, P, N], too.
        return_varlen_states: whether to return the states after each sequence of ``cu_seqlens``, [S, H, P, N], too.

    Returns:
        y [B, T, H, P], then the final states and the states of the sequences, if asked for.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    given = {
        "chunk_size": chunk_size, "D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit,
        "return_final_states": True,
    }  # fmt: skip
    if not return_varlen_states:
        y, final = ssd_scan(x, dt, A, B, C, initial_states=initial_states, seq_idx=seq_idx, **given)
        return (y, final) if return_final_states else y
    if cu_seqlens is None:
        raise ValueError("mamba_chunk_scan_combined: cu_seqlens must be given with return_varlen_states, got None")
    if seq_idx is None or initial_states is not None:
        raise ValueError(
            "mamba_chunk_scan_combined: return_varlen_states needs seq_idx to divide the scan as cu_seqlens does, "
            "and no initial_states"
        )
    y, states = ssd_scan(x, dt, A, B, C, seq_idx=seq_idx, cu_seqlens=cu_seqlens, **given)
    return (y, states[-1:], states) if return_final_states else (y, states)
