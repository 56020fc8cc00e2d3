"""Packing and unpacking in Triton. docs/format.md defines the layout."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.triton.arguments import check, check_float, check_packed, check_scale, vector, words_of
from bitkernels.triton.packed_matmul import SIGN_BITS, TERNARY_BITS, decode

_BLOCK = 32  # words a program


@triton.jit
def pack_kernel(
    p_w,  # [N, K]
    p_scale,  # [1] float32 or None
    p_packed,  # int32 [N, words]
    total,  # N * words
    words,
    K,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LANES: tl.constexpr = 32 // BITS
    o_word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_lane = tl.arange(0, LANES)
    o_n = o_word // words
    o_k = (o_word % words)[:, None] * LANES + o_lane[None, :]
    m_w = (o_word < total)[:, None] & (o_k < K)
    b_w = tl.load(p_w + o_n[:, None] * K + o_k, mask=m_w, other=0).to(tl.float32)
    if p_scale is not None:
        b_w = b_w * tl.div_rn(1.0, tl.load(p_scale))
    # A half rounds to even, that is to zero; everything beyond it saturates.
    ternary = 1 + tl.where(b_w > 0.5, 1, 0) - tl.where(b_w < -0.5, 1, 0)
    code = tl.where(m_w & (b_w >= 0), 1, 0) if BITS == 1 else ternary
    tl.store(p_packed + o_word, tl.sum(code << (o_lane * BITS)[None, :], 1), mask=o_word < total)


@triton.jit
def unpack_kernel(
    p_packed,  # int32 [N, words]
    p_w,  # [N, K]
    total,  # N * words
    words,
    K,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LANES: tl.constexpr = 32 // BITS
    o_word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_lane = tl.arange(0, LANES)
    o_n = o_word // words
    o_k = (o_word % words)[:, None] * LANES + o_lane[None, :]
    b_packed = tl.load(p_packed + o_word, mask=o_word < total, other=0)
    b_w = decode(b_packed[:, None], (o_lane * BITS)[None, :], BITS, p_w.dtype.element_ty == tl.int8)
    m_w = (o_word < total)[:, None] & (o_k < K)
    tl.store(p_w + o_n[:, None] * K + o_k, b_w.to(p_w.dtype.element_ty), mask=m_w)


def _check_dtype(op: str, argument: str, w: Tensor, bits: int) -> None:
    # Ternary weights also come as int8, already in {-1, 0, 1}.
    if bits == SIGN_BITS or w.dtype != torch.int8:
        check_float(op, argument, w)


def _pack(op: str, w: Tensor, bits: int, scale: Tensor | None = None) -> Tensor:
    check(w.dim() == 2, op, f"w must be [N, K], got {list(w.shape)}")
    _check_dtype(op, "w", w, bits)
    if scale is not None:
        check_scale(op, "scale", scale, w)
        check(scale.numel() == 1, op, f"scale must be of shape [1], got {list(scale.shape)}")
        scale = vector(scale)
    N, K = w.shape
    words = triton.cdiv(K, 32 // bits)
    packed = w.new_empty(N, words, dtype=torch.int32)
    if packed.numel():
        grid = (triton.cdiv(packed.numel(), _BLOCK),)
        pack_kernel[grid](w.contiguous(), scale, packed, packed.numel(), words, K, BITS=bits, BLOCK=_BLOCK)
    return packed.view(torch.uint32)


def _unpack(op: str, w_packed: Tensor, K: int, dtype: torch.dtype, bits: int) -> Tensor:
    check(K >= 0, op, f"K must not be negative, got {K}")
    check_packed(op, w_packed, K, 32 // bits)
    w = w_packed.new_empty(w_packed.shape[0], K, dtype=dtype)
    _check_dtype(op, "dtype", w, bits)
    if w.numel():
        total = w_packed.numel()
        grid = (triton.cdiv(total, _BLOCK),)
        unpack_kernel[grid](words_of(w_packed), w, total, w_packed.shape[1], K, BITS=bits, BLOCK=_BLOCK)
    return w


def pack_sign(w: Tensor) -> Tensor:
    return _pack("pack_sign", w, SIGN_BITS)


def unpack_sign(w_packed: Tensor, K: int, *, dtype: torch.dtype) -> Tensor:
    return _unpack("unpack_sign", w_packed, K, dtype, SIGN_BITS)


def pack_ternary(w: Tensor, scale: Tensor | None = None) -> Tensor:
    return _pack("pack_ternary", w, TERNARY_BITS, scale)


def unpack_ternary(w_packed: Tensor, K: int, *, dtype: torch.dtype) -> Tensor:
    return _unpack("unpack_ternary", w_packed, K, dtype, TERNARY_BITS)
