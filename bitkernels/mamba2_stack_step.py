"""``mamba2_stack_step``: a decode step through all layers of a model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitkernels import _ops  # noqa: F401  (loads the operators)

# Of a layer, those of mamba2_step's arguments that are parameters.
NAMES = (
    "in_norm", "in_packed", "in_alpha", "in_beta", "in_bias", "conv_weight", "conv_bias", "A", "D", "dt_bias",
    "out_norm", "out_packed", "out_alpha", "out_beta", "out_bias",
)  # fmt: skip
_BEFORE_CONV, _BEFORE_SCAN = NAMES.index("conv_weight"), NAMES.index("A")


def mamba2_stack_step(
    residual: Tensor,
    parameters: Sequence[Sequence[Tensor | None]],
    conv_state: Tensor,
    ssm_state: Tensor,
    dtype: torch.dtype,
    in_eps: float = 1e-5,
    out_eps: float = 1e-5,
    state_indices: Tensor | None = None,
) -> None:
    """One token of each of B requests through L layers, each of them :func:`mamba2_step`.

    On Hopper GPUs one to eight requests with bfloat16 activations and float32 states pass all layers in one kernel,
    where their parameters are contiguous float32 with column scales and L is at most 96. For one request, d_model and
    H P must be multiples of 128 up to 5120, P one of 8, N of 4 up to 128 and W at most 4; for several, d_model and H P
    multiples of 256, as many as a processor has room for (2560 and 5120 of 132 processors), H and P multiples of 8,
    N = 128, W = 4, with one group. Everything else takes the layers one after the other.

    Args:
        residual: [B, d_model], float32 (float64 where dtype is); updated in place.
        parameters: L sequences of in_norm, in_packed, in_alpha, in_beta, in_bias, conv_weight, conv_bias, A, D,
            dt_bias, out_norm, out_packed, out_alpha, out_beta and out_bias, arguments of mamba2_step. Layers may share
            them.
        conv_state: [L, B, W - 1, C], updated in place; with state_indices [L, slots, W - 1, C].
        ssm_state: [L, B, H, P, N], updated in place; with state_indices [L, slots, H, P, N]. 16-bit states are rounded
            to nearest.
        dtype: of what passes between the parts: float32, bfloat16 or float16 (float64 on the CPU).
        in_eps, out_eps: added to the mean squares.
        state_indices: int32 or int64 [B], which states each request has; distinct. A request with a negative index
            is padding.

    Not differentiable.

    Raises:
        ValueError: an argument's dtype, shape or device does not fit; the message names it. Where it is a layer's, the
            layers before it have moved their states.
    """
    for i, layer in enumerate(parameters):
        if len(layer) != len(NAMES):
            raise ValueError(
                f"mamba2_stack_step: parameters[{i}] must be {len(NAMES)} ({', '.join(NAMES)}), got {len(layer)}"
            )
    flat = [t for layer in parameters for t in layer]
    torch.ops.bitkernels.mamba2_stack_step(residual, flat, conv_state, ssm_state, dtype, in_eps, out_eps, state_indices)


def _check(residual: Tensor, parameters: list[Tensor | None], conv_state: Tensor, ssm_state: Tensor) -> int:
    """The number of layers."""

    def check(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"mamba2_stack_step: {message}")

    layers, rest = divmod(len(parameters), len(NAMES))
    check(rest == 0, f"parameters must be {len(NAMES)} a layer, got {len(parameters)}")
    check(residual.dim() == 2, f"residual must be [B, d_model], got {list(residual.shape)}")
    for name, state, form in (
        ("conv_state", conv_state, "[L, B, W - 1, C]"),
        ("ssm_state", ssm_state, "[L, B, H, P, N]"),
    ):
        check(state.dim() == form.count(",") + 1, f"{name} must be {form}, got {list(state.shape)}")
        check(state.shape[0] == layers, f"{name} must have the states of {layers} layers, got {state.shape[0]}")
        check(state.device == residual.device, f"{name} must be on the device of the first argument")
    return layers


def _run(
    residual: Tensor,
    parameters: list[Tensor | None],
    conv_state: Tensor,
    ssm_state: Tensor,
    dtype: torch.dtype,
    in_eps: float = 1e-5,
    out_eps: float = 1e-5,
    state_indices: Tensor | None = None,
) -> None:
    """``bitkernels::mamba2_stack_step``."""
    layers, options = _check(residual, parameters, conv_state, ssm_state), (dtype, in_eps, out_eps, state_indices)
    run = torch.ops.bitkernels.mamba2_stack_step_hopper
    if residual.is_cuda and _HAS_KERNEL and layers > 0 and run(residual, parameters, conv_state, ssm_state, *options):
        return
    for i in range(layers):
        own = parameters[i * len(NAMES) : (i + 1) * len(NAMES)]
        torch.ops.bitkernels.mamba2_step(
            residual, *own[:_BEFORE_CONV], conv_state[i], *own[_BEFORE_CONV:_BEFORE_SCAN], ssm_state[i],
            *own[_BEFORE_SCAN:], *options,
        )  # fmt: skip


_HAS_KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key("bitkernels::mamba2_stack_step_hopper", "CUDA")
for _key in ("CPU", "CUDA"):
    torch.library.impl("bitkernels::mamba2_stack_step", _key, _run)


@torch.library.register_fake("bitkernels::mamba2_stack_step")
def _(residual, parameters, conv_state, ssm_state, *arguments, **options):
    torch._check(residual.dim() == 2, lambda: f"mamba2_stack_step: residual must be [B, d_model], got {residual.shape}")
