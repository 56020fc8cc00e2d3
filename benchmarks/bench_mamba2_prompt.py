"""A prompt through a layer, by the wall clock: one call against one for each operator."""

import torch
from bench_mamba2_step import TAPS, projection, sizes
from harness import HEADS, STATE, Contender, device_of, nbytes, verify

import bitkernels

CALLS = 20  # in a row, as layers follow each other


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("model", ["780M", "2.7B"] if cuda else ["780M"])
    metafunc.parametrize("T", [2048, 16384] if cuda else [64])


def test_mamba2_prompt(model, T, device, compare):
    K, inner, C = sizes(model)
    H = HEADS[model]
    N = inner + C + H
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    into, out = projection(N, K, device), projection(K, inner, device)
    conv, weight, bias = (torch.randn(s, device=device) for s in ((1, TAPS - 1, C), (C, TAPS), (C,)))
    state, heads = torch.randn(1, H, inner // H, STATE, device=device), [torch.rand(H, device=device) for _ in range(3)]
    residual = torch.randn(1, T, K, device=device)
    args = (residual, *into, None, conv, weight, bias, state, -heads[0], *heads[1:], *out, None)

    def parts(residual, a, b, c, d, _, conv, weight, bias, state, A, D, dt_bias, e, f, g, h, *rest):
        y = bitkernels.mamba2_in_step(residual[0], a, b, c, d, None, None, None, 0, dtype)[None]
        z, xbc, dt = y.split([inner, C, H], -1)
        x, B, C_ = bitkernels.causal_conv1d(xbc, weight, bias, conv).split([inner, STATE, STATE], -1)
        z, x = (t.unflatten(-1, (H, -1)) for t in (z, x))
        gated, final = bitkernels.ssd_scan(
            x, dt, A, B[:, :, None], C_[:, :, None], D=D, z=z, dt_bias=dt_bias, dt_softplus=True, initial_states=state,
            return_final_states=True,
        )  # fmt: skip
        conv.copy_(xbc[:, 1 - TAPS :])
        state.copy_(final)
        bitkernels.mamba2_out_step(residual[0], gated.flatten(2)[0], e, f, g, h)

    def own():
        return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]

    def calls(function, *more):
        def make():
            mine = own()

            def call():
                for _ in range(CALLS):
                    function(*mine, *more)
                if device == "cuda":
                    torch.cuda.synchronize()

            return call

        return make

    mine, theirs = own(), own()
    with torch.inference_mode():
        bitkernels.mamba2_prompt(*mine, dtype)
        parts(*theirs)
    verify(mine[0].cpu(), theirs[0].cpu().double(), 8e-3 if dtype == torch.bfloat16 else 1e-5)
    # Bytes: the weights once, the residual, the state and the inputs of the convolution read and written.
    size = CALLS * (nbytes(*into, *out, weight, bias) + 2 * nbytes(residual, conv, state))
    ours = Contender("bitkernels", calls(bitkernels.mamba2_prompt, dtype), size, wall=True)
    peer = Contender("four operators", calls(parts), size, wall=True)
    compare(
        f"{model} layer, T={T}, {CALLS} calls", ours, [peer], CALLS * 2 * T * (N + inner) * K, shape=[T, N, K],
        dtype=str(dtype),
    )  # fmt: skip
