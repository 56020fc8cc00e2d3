"""A token of each request through all layers of a model, against the layers' own steps."""

import torch
from harness import HEADS, STATE, Contender, device_of, nbytes, on_copies, verify

import bitkernels

LAYERS = {"780M": 48, "2.7B": 64}
TAPS = 4


def pytest_generate_tests(metafunc):
    # On a CPU it is the layers' own steps; bench_mamba2_step.py times those.
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("model", list(LAYERS) if cuda else [])
    metafunc.parametrize("B", [1, 2, 4, 8])


def layer(d_model, d_inner, heads):
    """The parameters of a layer, in the order of mamba2_stack_step."""

    def projection(N, K):
        w_packed = bitkernels.pack_sign(torch.randn(N, K, device="cuda"))
        return torch.rand(K, device="cuda") + 0.5, w_packed, torch.rand(K, device="cuda") * K**-0.5, None

    channels = d_inner + 2 * STATE
    into, out = projection(d_inner + channels + heads, d_model), projection(d_model, d_inner)
    conv = torch.randn(channels, TAPS, device="cuda") * 0.5, torch.zeros(channels, device="cuda")
    A, D, dt_bias = (torch.rand(heads, device="cuda") for _ in range(3))
    zeros = [torch.zeros(K, device="cuda") for K in (d_model, d_inner)]
    return (*into[:3], zeros[0], None, *conv, -A, D, dt_bias, *out[:3], zeros[1], None)


def test_mamba2_stack_step(model, B, compare):
    heads, count = HEADS[model], LAYERS[model]
    d_inner, d_model = 64 * heads, 32 * heads
    parameters = [layer(d_model, d_inner, heads) for _ in range(count)]
    residual = torch.randn(B, d_model, device="cuda")
    conv = torch.randn(count, B, TAPS - 1, d_inner + 2 * STATE, device="cuda")
    ssm = torch.randn(count, B, heads, 64, STATE, device="cuda")

    def one_kernel(residual, conv, ssm):
        bitkernels.mamba2_stack_step(residual, parameters, conv, ssm, torch.bfloat16)
        return residual

    def layer_by_layer(residual, conv, ssm):
        for own, c, s in zip(parameters, conv, ssm, strict=True):
            bitkernels.mamba2_step(residual, *own[:5], c, *own[5:7], s, *own[7:], torch.bfloat16)
        return residual

    copies = [[t.clone() for t in (residual, conv, ssm)] for _ in range(2)]
    verify(one_kernel(*copies[0]).cpu(), layer_by_layer(*copies[1]).cpu().double(), 5e-2)
    # Bytes: the parameters once, the residual and the states read and written.
    size = sum(nbytes(t) for own in parameters for t in own if t is not None) + 2 * nbytes(residual, conv, ssm)
    ours = Contender("bitkernels", on_copies(one_kernel, residual, conv, ssm), size)
    peer = Contender("layer by layer", on_copies(layer_by_layer, residual, conv, ssm), size)
    products = sum(own[i].numel() * 32 for own in parameters for i in (1, 11))
    compare(f"{model} stack, B={B}", ours, [peer], 2 * B * products, shape=[B, count, d_model], dtype="torch.bfloat16")
