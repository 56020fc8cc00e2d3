"""``mamba2_step``: a decode step of the Mamba-2 block; ``mamba2_in_step`` and ``mamba2_out_step``: its ends."""

import functools

import torch
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)

# As in csrc/cuda/mamba2_step.cu.
ONE_PRODUCT_TOKENS = 2048


def mamba2_in_step(
    residual: Tensor,
    norm_weight: Tensor,
    w_packed: Tensor,
    alpha: Tensor,
    beta: Tensor,
    conv_state: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_start: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token: RMSNorm, the packed input projection, and the causal convolution's step over some of its columns.

    ``y = packed_linear(rms_norm(residual) * norm_weight)``, and then
    ``y[:, conv_start:conv_start + C] = causal_conv1d_step(conv_state, those columns)`` with SiLU. Without conv_state
    norm and projection alone, of tokens of any kind: of a prompt, see ``one_product``.

    Args:
        residual: [B, K], float32 (float64 where dtype is).
        norm_weight: [K], any floating dtype.
        w_packed, alpha, beta, bias: of :func:`bitkernels.packed_linear`, with N rows.
        conv_state: [B, W - 1, C], any floating dtype of activations, the inputs before this token, oldest first;
            overwritten with the last W - 1 inputs. With state_indices [slots, W - 1, C]. Or None.
        conv_weight: [C, W], any floating dtype; None where conv_state is.
        conv_bias: [C], optional.
        conv_start: the first of the C columns that the convolution takes.
        dtype: of the result and of what enters the convolution: float32, bfloat16 or float16 (float64 on the CPU).
        eps: added to the mean square.
        state_indices: int32 or int64 [B], which state each request has; distinct. A request with a negative
            index is padding: it has no state, its history counts as zero.

    Returns:
        y [B, N] in dtype. Not differentiable.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    return torch.ops.bitkernels.mamba2_in_step(
        residual, norm_weight, w_packed, alpha, beta, conv_state, conv_weight, conv_bias, conv_start, dtype, bias, eps,
        state_indices,
    )  # fmt: skip


def mamba2_out_step(
    residual: Tensor,
    y: Tensor,
    norm_weight: Tensor,
    w_packed: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """One token: ``residual += packed_linear(rms_norm(y) * norm_weight)``. Many: see ``one_product``.

    Args:
        residual: [B, N], float32 (float64 where y is); updated in place.
        y: [B, K], float32, bfloat16 or float16 (float64 on the CPU).
        norm_weight: [K], any floating dtype.
        w_packed, alpha, beta, bias: of :func:`bitkernels.packed_linear`, with N rows.
        eps: added to the mean square.

    Not differentiable.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it.
    """
    torch.ops.bitkernels.mamba2_out_step(residual, y, norm_weight, w_packed, alpha, beta, bias, eps)


def one_product(tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the products at a block's ends take norm and sum along: on Hopper GPUs, for many tokens of bf16. Then
    ``mamba2_in_step`` and ``mamba2_out_step`` are the way to read a prompt."""
    if tokens < ONE_PRODUCT_TOKENS or dtype != torch.bfloat16 or device.type != "cuda":
        return False
    return _has_hopper_kernels() and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _has_hopper_kernels() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("bitkernels::ssd_scan_hopper", "CUDA")


def mamba2_step(
    residual: Tensor,
    in_norm: Tensor,
    in_packed: Tensor,
    in_alpha: Tensor,
    in_beta: Tensor,
    in_bias: Tensor | None,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ssm_state: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    out_norm: Tensor,
    out_packed: Tensor,
    out_alpha: Tensor,
    out_beta: Tensor,
    out_bias: Tensor | None,
    dtype: torch.dtype,
    in_eps: float = 1e-5,
    out_eps: float = 1e-5,
    state_indices: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
) -> None:
    """One token through a layer: :func:`mamba2_in_step`, :func:`ssd_step` of its columns, :func:`mamba2_out_step`.

    The projection's columns are z [H P], x [H P], B [G N], C [G N] and dt [H]; x, B and C pass the convolution, dt
    takes softplus. In one call, since on a CPU calls take as long as kernels.

    Args:
        residual: [B, K], float32 (float64 where dtype is); updated in place.
        in_norm, in_packed, in_alpha, in_beta, in_bias: norm_weight, w_packed, alpha, beta and bias of mamba2_in_step.
        conv_state, conv_weight, conv_bias: of mamba2_in_step, for H P + 2 G N channels.
        ssm_state, A, D, dt_bias, seed, position: state, A, D, dt_bias, seed and position of ssd_step.
        out_norm, out_packed, out_alpha, out_beta, out_bias: norm_weight, w_packed, alpha, beta and bias of
            mamba2_out_step.
        dtype: of what passes between the parts: float32, bfloat16 or float16 (float64 on the CPU).
        in_eps, out_eps: added to the mean squares.
        state_indices: int32 or int64 [B], which states each request has; distinct. A request with a negative index
            is padding.

    Not differentiable.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it. No state has changed then.
    """
    torch.ops.bitkernels.mamba2_step(
        residual, in_norm, in_packed, in_alpha, in_beta, in_bias, conv_state, conv_weight, conv_bias, ssm_state, A, D,
        dt_bias, out_norm, out_packed, out_alpha, out_beta, out_bias, dtype, in_eps, out_eps, state_indices, seed,
        position,
    )  # fmt: skip


@torch.library.register_fake("bitkernels::mamba2_in_step")
def _(
    residual, norm_weight, w_packed, alpha, beta, conv_state, conv_weight, conv_bias, conv_start, dtype, bias=None,
    eps=1e-5, state_indices=None,
):  # fmt: skip
    torch._check(residual.dim() == 2, lambda: f"mamba2_in_step: residual must be [B, K], got {list(residual.shape)}")
    return residual.new_empty(residual.shape[0], w_packed.shape[0], dtype=dtype)


@torch.library.register_fake("bitkernels::mamba2_out_step")
def _(residual, y, norm_weight, w_packed, alpha, beta, bias=None, eps=1e-5):
    torch._check(y.dim() == 2, lambda: f"mamba2_out_step: y must be [B, K], got {list(y.shape)}")


@torch.library.register_fake("bitkernels::mamba2_step")
def _(residual, *arguments):
    torch._check(residual.dim() == 2, lambda: f"mamba2_step: residual must be [B, K], got {list(residual.shape)}")
