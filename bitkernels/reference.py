"""The truth: every operation in plain PyTorch, run in float64 by the tests.

Kernels are compared with this file and with nothing else, so it favours the shape of the
equations over speed. All functions are differentiable where the operation is; the straight-through
estimators are written as ``value.detach() + (latent - latent.detach())``.

Names: ``out[M, N] = x[M, K] @ W[N, K]^T`` for the linear layers; batch ``B``, time ``T``, heads
``H``, head dimension ``P``, state dimension ``N`` and groups ``G`` for the scan.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIGN_BITS_PER_WORD = 32
TERNARY_CODES_PER_WORD = 16


def _pack_words(codes: Tensor, bits: int, padding: int) -> Tensor:
    """[N, K] small non-negative integers -> uint32 [N, ceil(K * bits / 32)], least significant first."""
    per_word = 32 // bits
    n, k = codes.shape
    words = -(-k // per_word)
    padded = F.pad(codes.to(torch.int64), (0, words * per_word - k), value=padding)
    shifts = torch.arange(per_word, device=codes.device) * bits
    packed = (padded.view(n, words, per_word) << shifts).sum(-1)
    return packed.to(torch.int32).view(torch.uint32)


def _unpack_words(w_packed: Tensor, k: int, bits: int) -> Tensor:
    per_word = 32 // bits
    words = w_packed.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    shifts = torch.arange(per_word, device=w_packed.device) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :k]


def pack_sign(w: Tensor) -> Tensor:
    """[N, K] -> uint32 [N, ceil(K/32)]; bit 1 means +1, sign(0) = +1, padding bits 0."""
    return _pack_words(w >= 0, bits=1, padding=0)


def unpack_sign(w_packed: Tensor, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint32 [N, ceil(K/32)] -> [N, K] of -1 and +1."""
    return (2 * _unpack_words(w_packed, K, bits=1) - 1).to(dtype)


def pack_ternary(w: Tensor) -> Tensor:
    """[N, K] -> uint32 [N, ceil(K/16)]; 2-bit code clip(round(w), -1, 1) + 1, padding code 1."""
    codes = w.round().clamp(-1, 1).to(torch.int64) + 1 if w.is_floating_point() else w.clamp(-1, 1).to(torch.int64) + 1
    return _pack_words(codes, bits=2, padding=1)


def unpack_ternary(w_packed: Tensor, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint32 [N, ceil(K/16)] -> [N, K] of -1, 0 and +1."""
    return (_unpack_words(w_packed, K, bits=2) - 1).to(dtype)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token int8, in fp32 and in exactly this order: returns q int8 [..., K], scale fp32 [...].

    ``scale = 127 / max(absmax, 1e-5)``; ``q = clip(round_half_even(x * scale), -128, 127)``.
    """
    x = x.float()
    absmax = (x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])).clamp(min=1e-5)
    scale = torch.full_like(absmax, 127.0) / absmax  # 127.0 / absmax would round twice: reciprocal, then product
    q = (x * scale.unsqueeze(-1)).round().clamp(-128, 127)
    return q.to(torch.int8), scale


def quantize_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """BitNet b1.58 weights: returns Q in {-1, 0, 1} (same dtype) and the multiplier ``1/s``, shape [1].

    ``s = 1 / max(mean|W|, 1e-5)``; ``Q = clip(round(W s), -1, 1)``; ``W~ = Q / s``.
    """
    mean = weight.abs().mean().clamp(min=1e-5)
    q = (weight * (1.0 / mean)).round().clamp(-1, 1)
    return q, mean.reshape(1)


def _dense(sign: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``W~ = alpha * S + beta``; [K] and [1, K] scale columns, [N, 1] rows, [1] everything."""
    return alpha * sign + beta


def packed_linear(x: Tensor, w_packed: Tensor, alpha: Tensor, beta: Tensor, bias: Tensor | None = None) -> Tensor:
    sign = unpack_sign(w_packed, x.shape[-1], x.dtype)
    return F.linear(x, _dense(sign, alpha, beta), bias)


def dense_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x @ weight^T, its columns times scale."""
    y = F.linear(x, weight)
    return y if scale is None else y * scale


def head_step(residual: Tensor, norm_weight: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The normalised residual @ weight^T."""
    return F.linear(F.rms_norm(residual, residual.shape[-1:], norm_weight, eps), weight)


def sign_linear(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, bias: Tensor | None = None) -> Tensor:
    """FBI-Linear with the identity straight-through estimator of sign (no clipping)."""
    sign = torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype)
    sign = sign + (weight - weight.detach())
    return F.linear(x, _dense(sign, alpha, beta), bias)


def ternary_linear(
    x: Tensor, w_packed: Tensor, scale: Tensor, bias: Tensor | None = None, act_bits: int | None = None
) -> Tensor:
    """``W~ = scale * Q``. With ``act_bits=8`` the sum is exact in integers and the result is
    ``float32(sum) * (scale / act_scale) + bias``, each step rounded once."""
    q = unpack_ternary(w_packed, x.shape[-1], x.dtype)
    if act_bits is None:
        return F.linear(x, scale * q, bias)
    xq, act_scale = quantize_int8(x)
    total = F.linear(xq.double(), q.double())  # |sum| <= 128 K < 2^53: exact
    y = total.float() * (scale.float() / act_scale.unsqueeze(-1))
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def fake_quantize_int8(x: Tensor) -> Tensor:
    """int8 and back, with the identity as gradient."""
    q, scale = quantize_int8(x.detach())
    return (q.to(scale.dtype) / scale.unsqueeze(-1)).to(x.dtype) + (x - x.detach())


def ternary_linear_ste(x: Tensor, weight: Tensor, bias: Tensor | None = None, act_bits: int | None = 8) -> Tensor:
    """BitLinear without its norm; straight-through for weights and activations."""
    q, scale = quantize_ternary(weight.detach())
    dense = scale * q + (weight - weight.detach())
    if act_bits == 8:
        x = fake_quantize_int8(x)
    return F.linear(x, dense, bias)


def bit_embedding(ids: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-6) -> Tensor:
    """BitEmbedding: ternary table, lookup, LayerNorm, int8 per token; straight-through."""
    q, scale = quantize_ternary(weight.detach())
    table = scale * q + (weight - weight.detach())
    y = F.layer_norm(F.embedding(ids, table), (weight.shape[1],), norm_weight, norm_bias, eps)
    return fake_quantize_int8(y)


def ssd_scan(
    x: Tensor,  # [B, T, H, P]
    dt: Tensor,  # [B, T, H]
    A: Tensor,  # [H], negative
    B: Tensor,  # [B, T, G, N]
    C: Tensor,  # [B, T, G, N]
    D: Tensor | None = None,  # [H] or [H, P]
    z: Tensor | None = None,  # [B, T, H, P]
    dt_bias: Tensor | None = None,  # [H]
    initial_states: Tensor | None = None,  # [B, H, P, N]; [S, H, P, N] with cu_seqlens
    seq_idx: Tensor | None = None,  # int [B, T]: the state restarts from zero where it changes
    cu_seqlens: Tensor | None = None,  # int [S + 1]: S sequences packed into a batch of one
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """The sequential recurrence (Mamba-2): returns y [B, T, H, P] and the final states.

    ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t``; ``y_t = C_t h_t + D x_t``, then ``* silu(z)``.
    Final states are [B, H, P, N], or [S, H, P, N] with ``cu_seqlens``.
    """
    if cu_seqlens is not None:
        ys, finals = [], []
        for s, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
            part = slice(begin, end)
            y, final = ssd_scan(
                x[:, part], dt[:, part], A, B[:, part], C[:, part], D, None if z is None else z[:, part], dt_bias,
                None if initial_states is None else initial_states[s : s + 1],
                None if seq_idx is None else seq_idx[:, part], None, dt_softplus, dt_limit,
            )  # fmt: skip
            ys.append(y)
            finals.append(final)
        return torch.cat(ys, 1), torch.cat(finals, 0)

    batch, time, heads, headdim = x.shape
    repeat = heads // B.shape[2]
    B, C = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)
    h = x.new_zeros(batch, heads, headdim, B.shape[3]) if initial_states is None else initial_states
    ys = []
    for t in range(time):
        if seq_idx is not None and t > 0:
            same = (seq_idx[:, t] == seq_idx[:, t - 1]).to(h.dtype)
            h = h * same[:, None, None, None]
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        ys.append((h * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(ys, 1) if ys else x
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    if z is not None:
        y = y * F.silu(z)
    return y, h


def ssd_step(
    state: Tensor,  # [B, H, P, N], or [slots, H, P, N] with state_indices; updated in place
    x: Tensor,  # [B, H, P]
    dt: Tensor,  # [B, H]
    A: Tensor,  # [H]
    B: Tensor,  # [B, G, N]
    C: Tensor,  # [B, G, N]
    D: Tensor | None = None,  # [H] or [H, P]
    z: Tensor | None = None,  # [B, H, P]
    dt_bias: Tensor | None = None,  # [H]
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state_indices: Tensor | None = None,  # int [B], the slot of each request, negative: none
) -> Tensor:
    """One token of ``ssd_scan``: updates ``state`` and returns y [B, H, P], zero for requests without a slot."""
    if state_indices is not None:
        held = (state_indices >= 0).nonzero()[:, 0]
        slots = state_indices[held].long()
        own, y = state[slots], torch.zeros_like(x)
        y[held] = ssd_step(
            own,
            x[held],
            dt[held],
            A,
            B[held],
            C[held],
            D,
            None if z is None else z[held],
            dt_bias,
            dt_softplus,
            dt_limit,
        )
        state[slots] = own
        return y
    y, h = ssd_scan(
        x[:, None], dt[:, None], A, B[:, None], C[:, None], D, None if z is None else z[:, None], dt_bias,
        state.to(x.dtype), None, None, dt_softplus, dt_limit,
    )  # fmt: skip
    state.copy_(h)
    return y[:, 0]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): four 32-bit words, as int64, of counters below 2^32 and int64 seeds."""

    def product(a, b):
        """The high and low word of a product of words, in halves that an int64 holds."""
        low, high = (a & 0xFFFF) * b, (a >> 16) * b
        total = (high & 0xFFFFFFFFFFFF) + (low >> 16)
        return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)

    words = list(counter)
    keys = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        (high_0, low_0), (high_2, low_2) = product(words[0], 0xD2511F53), product(words[2], 0xCD9E8D57)
        words = [high_2 ^ words[1] ^ keys[0], low_2, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [(k + step) & 0xFFFFFFFF for k, step in zip(keys, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return words


def state_random_bits(seed: Tensor, position: Tensor, H: int, P: int, N: int) -> Tensor:
    """The 16 bits that round each element of a 16-bit state, int64 [B, H, P, N].

    They depend on the seed and position of the request and on the element, not on where its state is held: element n
    of row h P + p takes half ``n % 2`` of word ``n / 2 % 4`` of the draw with counter (n / 8, row, position).
    """
    group = torch.arange(-(-N // 8))[None, None, :]
    row = torch.arange(H * P)[None, :, None]
    position = position[:, None, None]
    counter = torch.broadcast_tensors(group, row, position & 0xFFFFFFFF, (position >> 32) & 0xFFFFFFFF)
    words = torch.stack(philox(counter, seed[:, None, None]), -1)  # [B, H P, groups, 4]
    halves = torch.stack([words & 0xFFFF, words >> 16], -1).flatten(2)
    return halves[..., :N].unflatten(1, (H, P))


def round_stochastically(v: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to bfloat16 or float16: away from zero where the part cut off exceeds ``bits`` of 16 bits' range.

    ``v / unit`` lies between two integers, of which the further from zero is taken with the probability of the
    fraction; a fraction keeps the 16 bits that bfloat16 cuts off, and 13 for float16.
    """
    fraction_bits, mantissa, smallest = (16, 7, -133) if dtype == torch.bfloat16 else (13, 10, -24)
    _, exponent = torch.frexp(v)
    unit = torch.exp2((exponent - 1 - mantissa).clamp(min=smallest).double())
    scaled = (v.abs().double() / unit * 2**fraction_bits).long()  # exact, or below the fraction's last bit
    rounded = (scaled + (bits >> (16 - fraction_bits))) >> fraction_bits
    return torch.where(v.isfinite(), torch.copysign(rounded * unit, v.double()), v.double()).to(dtype)


def causal_conv1d(
    x: Tensor,  # [B, T, C]
    weight: Tensor,  # [C, W]
    bias: Tensor | None = None,  # [C]
    initial_state: Tensor | None = None,  # [B, W - 1, C] the inputs before t = 0, oldest first; S for B with cu_seqlens
    seq_idx: Tensor | None = None,  # int [B, T]: inputs of another sequence count as zero
    cu_seqlens: Tensor | None = None,  # int [S + 1]: S sequences packed into a batch of one
    activation: str | None = "silu",
) -> Tensor:
    """Depthwise causal convolution over time: ``y_t = sum_w weight[:, w] x_{t - W + 1 + w} + bias``."""
    if cu_seqlens is not None:
        ys = []
        for s, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
            initial = None if initial_state is None else initial_state[s : s + 1]
            ids = None if seq_idx is None else seq_idx[:, begin:end]
            ys.append(causal_conv1d(x[:, begin:end], weight, bias, initial, ids, None, activation))
        return torch.cat(ys, 1)
    batch, time, channels = x.shape
    width = weight.shape[1]
    history = x.new_zeros(batch, width - 1, channels) if initial_state is None else initial_state.to(x.dtype)
    padded = torch.cat([history, x], 1)
    y = torch.zeros_like(x)
    for w in range(width):
        tap = padded[:, w : w + time]
        if seq_idx is not None:
            back = width - 1 - w
            # History before t = 0 belongs to the sequence at t = 0.
            ids = torch.cat([seq_idx[:, :1].expand(-1, back), seq_idx], 1)[:, :time]
            tap = tap * (ids == seq_idx).unsqueeze(-1).to(x.dtype)
        y = y + tap * weight[:, w]
    if bias is not None:
        y = y + bias
    return F.silu(y) if activation == "silu" else y


def causal_conv1d_step(
    conv_state: Tensor,  # [B, W - 1, C], updated in place
    x: Tensor,  # [B, C]
    weight: Tensor,  # [C, W]
    bias: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """One token of ``causal_conv1d``: shifts ``conv_state`` and returns y [B, C]."""
    y = causal_conv1d(x[:, None], weight, bias, conv_state, None, None, activation)[:, 0]
    conv_state.copy_(torch.cat([conv_state[:, 1:], x[:, None].to(conv_state.dtype)], 1))
    return y


def mamba2_in_step(
    residual: Tensor,  # [B, K]
    norm_weight: Tensor,  # [K]
    w_packed: Tensor,
    alpha: Tensor,
    beta: Tensor,
    conv_state: Tensor | None,  # [B, W - 1, C], or [slots, W - 1, C] with state_indices; updated in place
    conv_weight: Tensor | None,  # [C, W]
    conv_bias: Tensor | None,
    conv_start: int,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    state_indices: Tensor | None = None,  # int [B], the slot of each request, negative: none
) -> Tensor:
    """Norm, projection, and a step of the convolution over columns [conv_start, conv_start + C), if any: [B, N]."""
    y = packed_linear(F.rms_norm(residual, residual.shape[-1:], norm_weight, eps), w_packed, alpha, beta, bias)
    if conv_state is None:
        return y
    slots = torch.arange(len(residual)) if state_indices is None else state_indices.long()
    own = conv_state.new_zeros(len(residual), *conv_state.shape[1:])
    own[slots >= 0] = conv_state[slots[slots >= 0]]
    columns = slice(conv_start, conv_start + conv_weight.shape[0])
    y[:, columns] = causal_conv1d_step(own, y[:, columns], conv_weight, conv_bias)
    conv_state[slots[slots >= 0]] = own[slots >= 0]
    return y


def mamba2_out_step(
    residual: Tensor,  # [B, N], updated in place
    y: Tensor,  # [B, K]
    norm_weight: Tensor,  # [K]
    w_packed: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """Norm and projection, added to the residual."""
    residual += packed_linear(F.rms_norm(y, y.shape[-1:], norm_weight, eps), w_packed, alpha, beta, bias)


def mamba2_step(
    residual: Tensor,  # [B, K], updated in place
    in_norm: Tensor,
    in_packed: Tensor,
    in_alpha: Tensor,
    in_beta: Tensor,
    in_bias: Tensor | None,
    conv_state: Tensor,  # as of mamba2_in_step
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ssm_state: Tensor,  # as of ssd_step
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    out_norm: Tensor,
    out_packed: Tensor,
    out_alpha: Tensor,
    out_beta: Tensor,
    out_bias: Tensor | None,
    in_eps: float = 1e-5,
    out_eps: float = 1e-5,
    state_indices: Tensor | None = None,
) -> None:
    """One token through a layer, whose input projection has the columns z, x, B, C and dt."""
    H, P, N = ssm_state.shape[1:]
    both = (conv_weight.shape[0] - H * P) // 2
    projected = mamba2_in_step(
        residual, in_norm, in_packed, in_alpha, in_beta, conv_state, conv_weight, conv_bias, H * P, in_bias, in_eps,
        state_indices,
    )  # fmt: skip
    z, x, B, C, dt = projected.split([H * P, H * P, both, both, H], -1)
    z, x, B, C = (t.unflatten(-1, (-1, width)) for t, width in ((z, P), (x, P), (B, N), (C, N)))
    y = ssd_step(ssm_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True, state_indices=state_indices)
    mamba2_out_step(residual, y.flatten(-2), out_norm, out_packed, out_alpha, out_beta, out_bias, out_eps)


def add_rms_norm(residual: Tensor | None, branch: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """total [..., width] and its norm."""
    total = branch if residual is None else residual + branch
    return total, total / (total.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-5, group_size: int | None = None) -> Tensor:
    """``RMSNorm(x * silu(z)) * weight`` over the last axis, in groups of ``group_size`` if given."""
    x = x * F.silu(z)
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return groups.flatten(-2) * weight


def distill_loss(
    hidden: Tensor,  # [..., K]
    head: Tensor,  # [V, K]
    teacher_logits: Tensor | None = None,  # [..., V]
    *,
    teacher_hidden: Tensor | None = None,  # [..., K']
    teacher_head: Tensor | None = None,  # [V, K']
    targets: Tensor | None = None,  # int64 [...]
    objective: str = "cross_entropy",
) -> Tensor:
    """The mean over tokens of ``-sum p log q``, ``sum p (log p - log q)`` or ``-log q[target]``."""
    log_q = F.linear(hidden, head).log_softmax(-1)
    if objective == "next_token":
        return -log_q.gather(-1, targets.unsqueeze(-1)).mean()
    if teacher_logits is None:
        teacher_logits = F.linear(teacher_hidden, teacher_head)
    log_p = teacher_logits.detach().log_softmax(-1)
    p = log_p.exp()
    terms = p * (log_p - log_q) if objective == "kl" else -p * log_q
    return terms.where(p > 0, 0.0).sum(-1).mean()  # 0 log 0 = 0


def mamba2_mixer(
    zxbcdt: Tensor,  # [B, T, H P + (H P + 2 G N) + H]
    conv_weight: Tensor,  # [H P + 2 G N, W]
    conv_bias: Tensor | None,  # [H P + 2 G N]
    dt_bias: Tensor,  # [H]
    A: Tensor,  # [H], negative
    D: Tensor | None,  # [H] or [H, P]
    norm_weight: Tensor,  # [H P]
    initial_conv_state: Tensor | None = None,  # [S, W - 1, H P + 2 G N]
    initial_states: Tensor | None = None,  # [S, H, P, N]
    seq_idx: Tensor | None = None,  # int [B, T]
    cu_seqlens: Tensor | None = None,  # int [S + 1]
    ngroups: int = 1,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    norm_eps: float = 1e-5,
    norm_group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A Mamba-2 block between its projections: returns y [B, T, H P] and the final states."""
    heads, width, channels = A.shape[0], norm_weight.shape[0], conv_weight.shape[0]
    z, xbc, dt = zxbcdt.split([width, channels, heads], -1)
    xbc = causal_conv1d(xbc, conv_weight, conv_bias, initial_conv_state, seq_idx, cu_seqlens)
    x, B, C = xbc.split([width, (channels - width) // 2, (channels - width) // 2], -1)
    B, C = (t.unflatten(-1, (ngroups, -1)) for t in (B, C))
    y, final_states = ssd_scan(
        x.unflatten(-1, (heads, -1)), dt, A, B, C, D, None, dt_bias, initial_states, seq_idx, cu_seqlens, True, dt_limit
    )
    return gated_rms_norm(y.flatten(2), z, norm_weight, norm_eps, norm_group_size), final_states
