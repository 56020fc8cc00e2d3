"""The mixer as one operator against the operators it is made of: what computing them again costs."""

import pytest
import torch
from harness import HEADDIM, HEADS, STATE, Contender, device_of, nbytes, on_copies, verify, with_gradients

import bitkernels
from bitkernels import reference

WIDTH = 4  # of the convolution


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("model", ["780M", "2.7B"] if cuda else ["780M"])
    metafunc.parametrize(("B", "T"), [(1, 2048), (8, 2048)] if cuda else [(1, 256)])


def parts(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight):
    heads, width = A.shape[0], norm_weight.shape[0]
    z, xbc, dt = zxbcdt.split([width, conv_weight.shape[0], heads], -1)
    x, B, C = bitkernels.causal_conv1d(xbc, conv_weight, conv_bias).split([width, STATE, STATE], -1)
    x = x.unflatten(-1, (heads, HEADDIM))
    y = bitkernels.ssd_scan(x, dt, A, B.unsqueeze(2), C.unsqueeze(2), D=D, dt_bias=dt_bias, dt_softplus=True)
    return bitkernels.gated_rms_norm(y.flatten(2), z, norm_weight)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_mamba2_mixer(model, B, T, backward, device, compare):
    H = HEADS[model]
    width, channels = H * HEADDIM, H * HEADDIM + 2 * STATE
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def tensor(*shape, to=torch.float32):
        return torch.randn(*shape, device=device).to(to).requires_grad_(backward)

    A, dt_bias = ((-torch.rand(H, device=device) - s).requires_grad_(backward) for s in (0.5, 3.0))
    zxbcdt = tensor(B, T, width + channels + H, to=dtype)
    arguments = (zxbcdt, tensor(channels, WIDTH), tensor(channels), dt_bias, A, tensor(H), tensor(width))
    y = bitkernels.mamba2_mixer(*arguments)
    part = zxbcdt[:1, :128].double()  # the recurrence is sequential: the beginning of one sequence suffices
    verify(y[:1, :128], reference.mamba2_mixer(part, *(t.double() for t in arguments[1:]))[0])

    # Bytes: the projection once, y once; the backward reads them again and writes the projection's gradient.
    size = nbytes(zxbcdt, y) + (2 * nbytes(zxbcdt) + nbytes(y) if backward else 0)
    # The convolution, and of the scan per token and head: states in and out.
    flops = B * T * (2 * WIDTH * channels + 4 * width * STATE)
    wrap = with_gradients if backward else lambda f: f
    ours = Contender("bitkernels", on_copies(wrap(bitkernels.mamba2_mixer), *arguments), size)
    others = [Contender("its parts", on_copies(wrap(parts), *arguments), size)]
    name = f"{model}, B={B}, T={T}, {'forward+backward' if backward else 'forward'}"
    compare(name, ours, others, flops * (3 if backward else 1), shape=[B, T, H, HEADDIM, STATE], dtype=str(dtype))
