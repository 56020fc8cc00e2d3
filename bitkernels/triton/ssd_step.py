"""One token of the SSD scan, in place: bound by the bytes of the state, read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.arguments import cdiv, next_power_of_2
from bitkernels.triton.elementwise import silu, step_options, step_size
from bitkernels.triton.mixer_arguments import check_step
from bitkernels.triton.stochastic_round import round_stochastically, state_random_bits

# State elements a program holds: few while requests do not fill the machine, else enough to hide the rest of its work.
SMALL_TILE, LARGE_TILE = 2048, 8192
LARGE_FROM = 1056 * LARGE_TILE


@triton.jit
def ssd_step_kernel(
    p_state,  # [slots, H, P, N], updated
    p_x,  # [B, H, P]
    p_dt,  # [B, H]
    p_A,  # [H]
    p_B,  # [B, G, N]
    p_C,  # [B, G, N]
    p_D,  # [H] or [H, P] by strides, or None
    p_z,  # [B, H, P] or None
    p_dt_bias,  # [H] or None
    p_state_indices,  # [B] the slot of each request, or None: its index
    p_seed,  # [B], or None: 16-bit states are rounded to nearest
    p_position,  # [B] or None
    p_y,  # [B, H, P] contiguous
    slots,
    H,
    P,
    N,
    stride_s_b,
    stride_s_h,
    stride_s_p,
    stride_s_n,
    stride_x_b,
    stride_x_h,
    stride_x_p,
    stride_dt_b,
    stride_dt_h,
    stride_A_h,
    stride_B_b,
    stride_B_g,
    stride_B_n,
    stride_C_b,
    stride_C_g,
    stride_C_n,
    stride_D_h,
    stride_D_p,
    stride_z_b,
    stride_z_h,
    stride_z_p,
    stride_bias_h,
    dt_min,
    dt_max,
    HEADS_PER_GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_g = i_h // HEADS_PER_GROUP
    o_p = tl.program_id(2).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    m_p = o_p < P
    m_n = o_n < N
    m_state = m_p[:, None] & m_n[None, :]

    i_slot = i_b
    if p_state_indices is not None:
        i_slot = tl.load(p_state_indices + i_b).to(tl.int64)
        if (i_slot < 0) | (i_slot >= slots):
            tl.store(p_y + (i_b * H + i_h) * P + o_p, tl.zeros([BLOCK_P], p_y.dtype.element_ty), mask=m_p)
            return
    p_state += i_slot * stride_s_b + i_h * stride_s_h + o_p[:, None] * stride_s_p + o_n[None, :] * stride_s_n
    state = tl.load(p_state, mask=m_state, other=0.0).to(tl.float32)
    x = tl.load(p_x + i_b * stride_x_b + i_h * stride_x_h + o_p * stride_x_p, mask=m_p, other=0.0).to(tl.float32)
    B = tl.load(p_B + i_b * stride_B_b + i_g * stride_B_g + o_n * stride_B_n, mask=m_n, other=0.0).to(tl.float32)
    C = tl.load(p_C + i_b * stride_C_b + i_g * stride_C_g + o_n * stride_C_n, mask=m_n, other=0.0).to(tl.float32)
    dt = tl.load(p_dt + i_b * stride_dt_b + i_h * stride_dt_h).to(tl.float32)
    if p_dt_bias is not None:
        dt += tl.load(p_dt_bias + i_h * stride_bias_h).to(tl.float32)
    dt = step_size(dt, dt_min, dt_max, SOFTPLUS, CLAMP)
    decay = tl.exp(dt * tl.load(p_A + i_h * stride_A_h).to(tl.float32))

    state = state * decay + (dt * x)[:, None] * B[None, :]
    if p_seed is None:
        tl.store(p_state, state.to(p_state.dtype.element_ty), mask=m_state)
    else:
        bits = state_random_bits(
            tl.load(p_seed + i_b), tl.load(p_position + i_b), (i_h * P + o_p).to(tl.int32), BLOCK_P, BLOCK_N
        )
        tl.store(p_state, round_stochastically(state, bits, p_state.dtype.element_ty), mask=m_state)
    y = tl.sum(state * C[None, :], 1)
    if p_D is not None:
        y += tl.load(p_D + i_h * stride_D_h + o_p * stride_D_p, mask=m_p, other=0.0).to(tl.float32) * x
    if p_z is not None:
        z = tl.load(p_z + i_b * stride_z_b + i_h * stride_z_h + o_p * stride_z_p, mask=m_p, other=0.0)
        y *= silu(z.to(tl.float32))
    tl.store(p_y + (i_b * H + i_h) * P + o_p, y.to(p_y.dtype.element_ty), mask=m_p)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    state_indices: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """``bitkernels::ssd_step``."""
    check_step("ssd_step", state, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max, state_indices, seed, position)
    batch, H, P = x.shape
    G, N = B.shape[1:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    if state.dtype == torch.float32:
        seed = position = None
    state_indices, seed, position = (None if t is None else t.contiguous() for t in (state_indices, seed, position))
    block_n = max(8, next_power_of_2(N))  # a draw of random bits serves eight elements
    tile = LARGE_TILE if batch * H * P * N >= LARGE_FROM else SMALL_TILE
    block_p = min(next_power_of_2(P), max(1, tile // block_n))
    limits, flags = step_options(dt_softplus, dt_min, dt_max)
    ssd_step_kernel[(batch, H, cdiv(P, block_p))](
        state, x, dt, A, B, C, D, z, dt_bias, state_indices, seed, position, y, state.shape[0], H, P, N,
        *state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(),
        *((0, 0) if D is None else (*D.stride(), 0)[:2]), *((0, 0, 0) if z is None else z.stride()),
        *((0,) if dt_bias is None else dt_bias.stride()), *limits,
        HEADS_PER_GROUP=H // G, BLOCK_P=block_p, BLOCK_N=block_n, **flags, num_warps=4,
    )  # fmt: skip
    return y
