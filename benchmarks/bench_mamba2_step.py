"""A step of the Mamba-2 block, and its parts before and after the state, against the operators they are made of."""

import torch
import torch.nn.functional as F
from harness import HEADS, STATE, Contender, device_of, nbytes, on_copies, verify

import bitkernels
from bitkernels import reference

EXPAND, TAPS = 2, 4


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("model", HEADS)
    metafunc.parametrize("B", [1, 8, 128] if cuda else [1, 8])


def projection(N, K, device):
    """norm_weight, w_packed, alpha and beta."""
    w_packed = bitkernels.pack_sign(torch.randn(N, K, device=device))
    scale = K**-0.5
    return torch.rand(K, device=device) + 0.5, w_packed, torch.rand(K, device=device) * scale, torch.zeros(K).to(device)


def sizes(model):
    d_inner = 64 * HEADS[model]
    return d_inner // EXPAND, d_inner, d_inner + 2 * STATE


def test_mamba2_in_step(model, B, device, compare):
    K, start, C = sizes(model)
    N = start + C + HEADS[model]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    residual = torch.randn(B, K, device=device)
    norm_weight, *packed = projection(N, K, device)
    state = torch.randn(B, TAPS - 1, C, device=device)
    weight, bias = torch.randn(C, TAPS, device=device), torch.randn(C, device=device)
    args = (residual, norm_weight, *packed, state, weight, bias, start)

    def parts(residual, norm_weight, w_packed, alpha, beta, state, weight, bias, start, dtype):
        x = F.rms_norm(residual, (K,), norm_weight).to(dtype)
        y = bitkernels.packed_linear(x, w_packed, alpha, beta)
        return y, bitkernels.causal_conv1d_step(state, y[:, start : start + C], weight, bias)

    y = bitkernels.mamba2_in_step(*(a.clone() if a is state else a for a in args), dtype)
    wide = [a.cpu().double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    wide[2] = packed[0].cpu()
    verify(y.cpu(), reference.mamba2_in_step(*wide))
    # Bytes: the weights and the residual once, the inputs of the convolution read and written, y once.
    size = nbytes(residual, norm_weight, *packed, weight, bias, y) + 2 * nbytes(state)
    ours = Contender("bitkernels", on_copies(bitkernels.mamba2_in_step, *args, dtype), size)
    peer = Contender("one by one", on_copies(parts, *args, dtype), size)
    compare(f"{model} in, B={B}", ours, [peer], 2 * B * N * K, shape=[B, N, K], dtype=str(dtype))


def test_mamba2_out_step(model, B, device, compare):
    N, K, _ = sizes(model)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    residual, x = torch.randn(B, N, device=device), torch.randn(B, K, device=device).to(dtype)
    args = (residual, x, *projection(N, K, device))

    def parts(residual, x, norm_weight, *packed):
        x = F.rms_norm(x, (K,), norm_weight.to(x.dtype))
        return residual + bitkernels.packed_linear(x, *packed).float()

    mine, ref = residual.clone(), residual.cpu().double()
    bitkernels.mamba2_out_step(mine, *args[1:])
    packed_ref = [args[3].cpu(), *(a.cpu().double() for a in args[4:])]
    reference.mamba2_out_step(ref, x.cpu().double(), args[2].cpu().double(), *packed_ref)
    verify(mine.cpu(), ref, 8e-3 if dtype == torch.bfloat16 else 1e-5)
    # Bytes: the weights and x once, the residual read and written.
    size = nbytes(*args[1:]) + 2 * nbytes(residual)
    ours = Contender("bitkernels", on_copies(bitkernels.mamba2_out_step, *args), size)
    peer = Contender("one by one", on_copies(parts, *args), size)
    compare(f"{model} out, B={B}", ours, [peer], 2 * B * N * K, shape=[B, N, K], dtype=str(dtype))


def test_mamba2_step(model, B, device, compare):
    K, inner, C = sizes(model)
    H = HEADS[model]
    N = inner + C + H
    dtype = torch.bfloat16
    into, out = projection(N, K, device), projection(K, inner, device)
    conv, weight, bias = (torch.randn(s, device=device) for s in ((B, TAPS - 1, C), (C, TAPS), (C,)))
    state, heads = torch.randn(B, H, inner // H, STATE, device=device), [torch.rand(H, device=device) for _ in range(3)]
    residual = torch.randn(B, K, device=device)
    args = (residual, *into, None, conv, weight, bias, state, -heads[0], *heads[1:], *out, None)

    def parts(residual, a, b, c, d, _, conv, weight, bias, state, A, D, dt_bias, e, f, g, h, *rest):
        y = bitkernels.mamba2_in_step(residual, a, b, c, d, conv, weight, bias, inner, dtype)
        z, x, BC, dt = y.split([inner, inner, 2 * STATE, H], -1)
        z, x = (t.unflatten(-1, (H, -1)) for t in (z, x))
        gated = bitkernels.ssd_step(state, x, dt, A, *BC.unsqueeze(1).chunk(2, -1), D, z, dt_bias, True)
        bitkernels.mamba2_out_step(residual, gated.flatten(-2), e, f, g, h)
        return residual

    def copies():
        return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]

    mine = copies()
    bitkernels.mamba2_step(*mine, dtype)
    verify(mine[0].cpu(), parts(*copies()).cpu().double())
    # Bytes: the weights once, the residual, the state and the inputs of the convolution read and written.
    size = nbytes(*into, *out, weight, bias) + 2 * nbytes(residual, conv, state)
    ours = Contender("bitkernels", on_copies(bitkernels.mamba2_step, *args, dtype), size)
    peer = Contender("three operators", on_copies(parts, *args), size)
    compare(f"{model} layer, B={B}", ours, [peer], 2 * B * (N + inner) * K, shape=[B, N, K], dtype=str(dtype))
