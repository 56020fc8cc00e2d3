"""``mamba2_mixer``: everything between the two projections of a Mamba-2 block."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bitkernels._autograd import skipping_autograd
from bitkernels._ops import needed_grads
from bitkernels.ssd_scan import acc_dtype

TENSORS = 11  # arguments that are tensors; options follow

_mixer = skipping_autograd(torch.ops.bitkernels.mamba2_mixer.default)


def mamba2_mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    initial_conv_state: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ngroups: int = 1,
    chunk_size: int = 64,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    norm_eps: float = 1e-5,
    norm_group_size: int | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The mixer of Mamba-2 (Dao and Gu, 2024) from the output of in_proj to the input of out_proj.

    ``z, xBC, dt = split(zxbcdt)``; ``x, B, C = split(silu(causal_conv1d(xBC)))``;
    ``gated_rms_norm(ssd_scan(x, softplus(dt + dt_bias), A, B, C, D), z)``. The functions of these names do
    the work and say more of each argument. Training keeps the arguments alone: the backward computes the
    convolution and the scan again. ``S`` is the number of sequences, B without cu_seqlens.

    Args:
        zxbcdt: [B, T, H P + (H P + 2 G N) + H], float32, bfloat16 or float16 (float64 on the CPU).
        conv_weight: [H P + 2 G N, W], any floating dtype, as all that follow.
        conv_bias: [H P + 2 G N], or None.
        dt_bias: [H].
        A: [H], negative; H is taken from it.
        D: [H] or [H, P], or None.
        norm_weight: [H P].
        initial_conv_state: [S, W - 1, H P + 2 G N], the xBC before t = 0; optional.
        initial_states: [S, H, P, N]; optional.
        seq_idx: int32 or int64 [B, T]; optional.
        cu_seqlens: int32 or int64 [S + 1]; optional.
        ngroups: G, the groups of B and C.
        chunk_size: a hint for the scan; the result does not depend on it.
        dt_limit: range the step sizes are clamped to.
        norm_eps: added to the mean square of the norm.
        norm_group_size: neighbours that are normalised together, all H P if not given.
        return_final_states: whether to return the states after the last token too.

    Returns:
        y [B, T, H P] in zxbcdt's dtype, or (y, final states [S, H, P, N], float32, float64 where zxbcdt is).
        Differentiable in every floating-point argument, through the final states too.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    dt_min, dt_max = dt_limit
    y, final_states = _mixer(
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, initial_conv_state, initial_states, seq_idx,
        cu_seqlens, ngroups, chunk_size, dt_min, None if dt_max == math.inf else dt_max, norm_eps, norm_group_size,
    )  # fmt: skip
    return (y, final_states) if return_final_states else y


@torch.no_grad()
def gated_mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    initial_conv_state: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ngroups: int = 1,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """``mamba2_mixer`` up to its norm, for inference: :func:`bitkernels.mamba2_out_step` applies that in its product.

    Returns:
        (``ssd_scan(...) * silu(z)`` [B, T, H P]; the states after the last token).
    """
    heads, channels, ops = A.shape[0], conv_weight.shape[0], torch.ops.bitkernels
    z, xbc, dt = _split(zxbcdt, channels, heads)
    xbc = ops.causal_conv1d(xbc, conv_weight, conv_bias, initial_conv_state, None, cu_seqlens, True)
    x, B, C = _split_conv(xbc, z.shape[2], heads, ngroups)
    y, final_states = ops.ssd_scan(
        x, dt, A, B, C, D, z.unflatten(2, (heads, -1)), dt_bias, initial_states, None, cu_seqlens, True, 0.0, None,
        chunk_size,
    )  # fmt: skip
    return y.flatten(2), final_states


def _check(op: str, zxbcdt, conv_weight, A, norm_weight, ngroups) -> None:
    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{op}: {message}")

    require(A.dim() == 1, f"A must be [H], got {list(A.shape)}")
    require(norm_weight.dim() == 1, f"norm_weight must be [H P], got {list(norm_weight.shape)}")
    heads, width = A.shape[0], norm_weight.shape[0]
    fits = heads > 0 and width % heads == 0
    require(fits, f"norm_weight must have a multiple of {heads} heads, got {list(norm_weight.shape)}")
    require(conv_weight.dim() == 2, f"conv_weight must be [H P + 2 G N, W], got {list(conv_weight.shape)}")
    state = conv_weight.shape[0] - width
    fits = ngroups > 0 and state > 0 and state % (2 * ngroups) == 0
    require(fits, f"conv_weight must have {width} + 2 G N channels for G = {ngroups}, got {list(conv_weight.shape)}")
    require(zxbcdt.dim() == 3, f"zxbcdt must be [B, T, 2 H P + 2 G N + H], got {list(zxbcdt.shape)}")
    expected = width + conv_weight.shape[0] + heads
    require(zxbcdt.shape[2] == expected, f"zxbcdt must have {expected} features, got {list(zxbcdt.shape)}")


def _split(zxbcdt: Tensor, channels: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return zxbcdt.split([zxbcdt.shape[2] - channels - heads, channels, heads], -1)


def _split_conv(xbc: Tensor, width: int, heads: int, ngroups: int) -> tuple[Tensor, Tensor, Tensor]:
    state = (xbc.shape[2] - width) // 2
    x, B, C = xbc.split([width, state, state], -1)
    lead, groups = x.shape[:2], (ngroups, state // ngroups)
    return x.view(*lead, heads, width // heads), B.view(*lead, *groups), C.view(*lead, *groups)


def _norm_backward(dy, y, z, weight, eps, group_size, dz):
    gradients = torch.ops.bitkernels.gated_rms_norm_backward(dy, y, z, weight, eps, group_size)
    dz.copy_(gradients[1])
    return gradients


def _convolution_backward(dy, x, weight, bias, initial_state, seq_idx, cu_seqlens, silu, dx):
    gradients = torch.ops.bitkernels.causal_conv1d_backward(
        dy, x, weight, bias, initial_state, seq_idx, cu_seqlens, silu
    )  # fmt: skip
    dx.copy_(gradients[0])
    return gradients


def _writers(device: torch.device) -> tuple[Callable, Callable]:
    """The backwards of norm and convolution that write dz and dx to where their last argument says."""
    if device.type != "cuda":
        return _norm_backward, _convolution_backward
    from bitkernels.triton.arguments import on_its_device
    from bitkernels.triton.causal_conv1d import causal_conv1d_backward
    from bitkernels.triton.gated_rms_norm import gated_rms_norm_backward

    return on_its_device(gated_rms_norm_backward), on_its_device(causal_conv1d_backward)


@torch.library.impl("bitkernels::mamba2_mixer", "CompositeExplicitAutograd")
def _(
    zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, initial_conv_state=None, initial_states=None,
    seq_idx=None, cu_seqlens=None, ngroups=1, chunk_size=64, dt_min=0.0, dt_max=None, norm_eps=1e-5,
    norm_group_size=None,
):  # fmt: skip
    _check("mamba2_mixer", zxbcdt, conv_weight, A, norm_weight, ngroups)
    ops = torch.ops.bitkernels
    heads, width = A.shape[0], norm_weight.shape[0]
    z, xbc, dt = _split(zxbcdt, conv_weight.shape[0], heads)
    xbc = ops.causal_conv1d(xbc, conv_weight, conv_bias, initial_conv_state, seq_idx, cu_seqlens, True)
    x, B, C = _split_conv(xbc, width, heads, ngroups)
    y, final_states = ops.ssd_scan(
        x, dt, A, B, C, D, None, dt_bias, initial_states, seq_idx, cu_seqlens, True, dt_min, dt_max, chunk_size
    )
    return ops.gated_rms_norm(y.flatten(2), z, norm_weight, norm_eps, norm_group_size), final_states


@torch.library.impl("bitkernels::mamba2_mixer_backward", "CompositeExplicitAutograd")
def _(
    dy, dfinal_states, zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, initial_conv_state=None,
    initial_states=None, seq_idx=None, cu_seqlens=None, ngroups=1, chunk_size=64, dt_min=0.0, dt_max=None,
    norm_eps=1e-5, norm_group_size=None,
):  # fmt: skip
    _check("mamba2_mixer_backward", zxbcdt, conv_weight, A, norm_weight, ngroups)
    ops = torch.ops.bitkernels
    heads, width = A.shape[0], norm_weight.shape[0]
    z, xbc, dt = _split(zxbcdt, conv_weight.shape[0], heads)
    convolution = xbc, conv_weight, conv_bias, initial_conv_state, seq_idx, cu_seqlens, True
    x, B, C = _split_conv(ops.causal_conv1d(*convolution), width, heads, ngroups)
    scan = x, dt, A, B, C, D, None, dt_bias, initial_states, seq_idx, cu_seqlens, True, dt_min, dt_max, chunk_size
    y = ops.ssd_scan(*scan)[0].flatten(2)
    # The gradients of z, x B C and dt lie side by side, where what makes them writes them.
    dzxbcdt = torch.empty(zxbcdt.shape, dtype=zxbcdt.dtype, device=zxbcdt.device)
    dz, dxbc, ddt = _split(dzxbcdt, conv_weight.shape[0], heads)
    norm_backward, convolution_backward = _writers(zxbcdt.device)
    dy, _, dnorm_weight = norm_backward(dy, y, z, norm_weight, norm_eps, norm_group_size, dz)
    del y
    dx, own_ddt, dA, dB, dC, dD, _, ddt_bias, dinitial_states = ops.ssd_scan_backward(
        dy.unflatten(-1, (heads, -1)), dfinal_states, *scan
    )
    ddt.copy_(own_ddt)
    del dy, x, B, C, scan
    dconvolved = torch.cat([dx.flatten(2), dB.flatten(2), dC.flatten(2)], -1)
    del dx, dB, dC
    _, dconv_weight, dconv_bias, dinitial_conv_state = convolution_backward(dconvolved, *convolution, dxbc)
    return (
        dzxbcdt, dconv_weight, dconv_bias, ddt_bias, dA, dD, dnorm_weight, dinitial_conv_state, dinitial_states
    )  # fmt: skip


@torch.library.register_fake("bitkernels::mamba2_mixer")
def _(
    zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, initial_conv_state=None, initial_states=None,
    seq_idx=None, cu_seqlens=None, ngroups=1, chunk_size=64, dt_min=0.0, dt_max=None, norm_eps=1e-5,
    norm_group_size=None,
):  # fmt: skip
    _check("mamba2_mixer", zxbcdt, conv_weight, A, norm_weight, ngroups)
    heads, width = A.shape[0], norm_weight.shape[0]
    state = (conv_weight.shape[0] - width) // (2 * ngroups)
    sequences = zxbcdt.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_states = zxbcdt.new_empty(sequences, heads, width // heads, state, dtype=acc_dtype(zxbcdt.dtype))
    return zxbcdt.new_empty(*zxbcdt.shape[:2], width), final_states


@torch.library.register_fake("bitkernels::mamba2_mixer_backward")
def _(
    dy, dfinal_states, zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, initial_conv_state=None,
    initial_states=None, seq_idx=None, cu_seqlens=None, ngroups=1, chunk_size=64, dt_min=0.0, dt_max=None,
    norm_eps=1e-5, norm_group_size=None,
):  # fmt: skip
    acc = acc_dtype(zxbcdt.dtype)

    def gradient(t, dtype=acc):
        return zxbcdt.new_empty(0, dtype=acc) if t is None else t.new_empty(t.shape, dtype=dtype)

    return (
        gradient(zxbcdt, zxbcdt.dtype), gradient(conv_weight), gradient(conv_bias), gradient(dt_bias), gradient(A),
        gradient(D), gradient(norm_weight), gradient(initial_conv_state, zxbcdt.dtype), gradient(initial_states),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal_states):
    tensors = ctx.saved_tensors
    if dy is None:
        zxbcdt, norm_weight = tensors[0], tensors[6]
        dy = zxbcdt.new_zeros(*zxbcdt.shape[:2], norm_weight.shape[0])
    grads = torch.ops.bitkernels.mamba2_mixer_backward(dy, dfinal_states, *tensors, *ctx.options)
    needed = zip(grads, tensors, needed_grads(ctx, TENSORS), strict=False)
    return *(g.to(t.dtype) if need else None for g, t, need in needed), *[None] * (2 + len(ctx.options))


torch.library.register_autograd("bitkernels::mamba2_mixer", _backward, setup_context=_setup_context)
