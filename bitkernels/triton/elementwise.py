"""Functions of single values that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def silu(v):
    # The sigmoid as a square: a division takes twice the instructions, most of them for denominators that none has.
    root = tl.rsqrt(1.0 + tl.exp2(v * -1.4426950408889634))
    return v * root * root


@triton.jit
def silu_gradient(v):
    gate = tl.sigmoid(v)
    return gate * (1.0 + v * (1.0 - gate))


@triton.jit
def softplus(v):
    """log(1 + exp(v)), to full relative accuracy also where exp(v) is small, as trained step sizes are."""
    e = tl.exp(-tl.abs(v))
    u = 1.0 + e
    # log(u) errs by the rounding of u, relatively as much as u - 1 errs from e.
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(v, 0.0) + log1p


@triton.jit
def step_size(v, dt_min, dt_max, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr):
    """dt + bias to the step size."""
    if SOFTPLUS:
        v = softplus(v)
    if CLAMP:
        v = tl.minimum(tl.maximum(v, dt_min), dt_max)
    return v


def step_options(dt_softplus: bool, dt_min: float, dt_max: float | None) -> tuple[tuple[float, float], dict]:
    """The limits of ``step_size`` and its flags."""
    limits = dt_min, float("inf") if dt_max is None else dt_max
    # A softplus is positive already.
    return limits, {"SOFTPLUS": dt_softplus, "CLAMP": not dt_softplus or limits != (0.0, float("inf"))}
