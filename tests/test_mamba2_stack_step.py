from dataclasses import dataclass

import pytest
import torch
from helpers import assert_close, check_cuda_graph, noncontiguous, opcheck, rms_error, wide
from test_mamba2_step import Layer, layer_inputs

import bitkernels
from bitkernels import reference
from bitkernels.mamba2_stack_step import NAMES

# What changes in place.
RESULTS = ("residual", "conv_state", "ssm_state")


@dataclass
class Stack:
    """``count`` layers alike."""

    count: int
    layer: Layer
    W: int = 4

    def __str__(self):
        return f"L{self.count}-W{self.W}-{self.layer}"


# What passes all layers in one kernel on Hopper: one token, and several.
ONE_TOKEN = [
    Stack(1, Layer(1, 128, 2, 64, 1, 16)),
    Stack(3, Layer(1, 384, 12, 64, 1, 128)),
    Stack(2, Layer(1, 256, 32, 24, 2, 20, bias=True), W=3),
    Stack(4, Layer(1, 640, 160, 8, 4, 64, bias=True), W=2),
    Stack(2, Layer(1, 2560, 80, 64, 1, 128)),
    Stack(5, Layer(1, 1536, 48, 64, 8, 128), W=1),
]
TOKENS = [
    Stack(2, Layer(2, 256, 8, 32, 1, 128)),
    Stack(3, Layer(5, 768, 24, 64, 1, 128, bias=True)),
    Stack(2, Layer(8, 512, 16, 64, 1, 128, bias=True)),
    Stack(2, Layer(8, 2560, 80, 64, 1, 128)),
]
KERNEL = [*ONE_TOKEN, *TOKENS]
STACKS = [
    *KERNEL,
    Stack(2, Layer(1, 96, 3, 20, 1, 7)),
    Stack(2, Layer(1, 128, 2, 64, 1, 16, scales="row"), W=4),
    Stack(3, Layer(3, 128, 2, 64, 1, 16)),
    Stack(0, Layer(1, 128, 2, 64, 1, 16)),
]


def stack_inputs(stack, device, dtype=torch.bfloat16, slots=None):
    """What mamba2_stack_step takes, by name."""
    # Each layer adds about as much as the residual has.
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    layers = [layer_inputs(stack.layer, device, dtype, slots=slots) for _ in range(max(stack.count, 1))]
    layer, channels = stack.layer, layers[0]["conv_weight"].shape[0]
    for given in layers:
        for name, width in (("in", layer.K), ("out", layer.H * layer.P)):
            given[f"{name}_alpha"] *= 1.0 if name == "in" else width**-0.5
            given[f"{name}_beta"] *= width**-0.5
        given["conv_weight"] = torch.randn(channels, stack.W, device=device, dtype=acc) * stack.W**-0.5
    shape = (stack.count, slots or layer.batch)
    return {
        "residual": layers[0]["residual"],
        "parameters": [[given[name] for name in NAMES] for given in layers[: stack.count]],
        "conv_state": torch.randn(*shape, stack.W - 1, channels, device=device, dtype=acc),
        "ssm_state": torch.randn(*shape, layer.H, layer.P, layer.N, device=device, dtype=acc),
        "dtype": dtype,
        "in_eps": 1e-3,
        "out_eps": 1e-4,
    }


def copied(given):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}


def reference_step(given, state_indices=None):
    """The float64 reference's residual and states."""
    states = wide(*(given[name].clone() for name in RESULTS))
    for i, layer in enumerate(given["parameters"]):
        own = wide(*layer)
        reference.mamba2_step(
            states[0], *own[:5], states[1][i], *own[5:7], states[2][i], *own[7:], given["in_eps"], given["out_eps"],
            state_indices,
        )  # fmt: skip
    return states


def step_layers(given, state_indices=None):
    """The layers one after the other."""
    for i, own in enumerate(given["parameters"]):
        bitkernels.mamba2_step(
            given["residual"], *own[:5], given["conv_state"][i], *own[5:7], given["ssm_state"][i], *own[7:],
            given["dtype"], given["in_eps"], given["out_eps"], state_indices,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_what_one_kernel_takes(stack):
    """What it does not take goes the layers' own way, with the same results."""
    built = torch._C._dispatch_has_kernel_for_dispatch_key("bitkernels::mamba2_stack_step_hopper", "CUDA")
    if not (built and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("no Hopper GPU is visible")
    given = stack_inputs(stack, "cuda")
    given["parameters"] = [t for own in given["parameters"] for t in own]
    assert torch.ops.bitkernels.mamba2_stack_step_hopper(**given, state_indices=None) == (stack in KERNEL)


@pytest.mark.memcheck
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_as_accurate_as_the_layers(stack, device):
    """Errs no more than the layers' own steps, which round to bfloat16 in as many places, over two tokens."""
    given = stack_inputs(stack, device)
    layers = copied(given)
    for _ in range(2):  # the second takes what the first left
        expected = reference_step(given)
        bitkernels.mamba2_stack_step(**given)
        step_layers(layers)
        for name, ref in zip(RESULTS, expected, strict=True):
            bound = 1.25 * rms_error(layers[name], ref) + 1e-3
            assert bound < 0.05, "the layers' own steps leave nothing to compare with"
            assert_close(name, given[name], ref, bound)
        layers = copied(given)


def test_float64():
    given = stack_inputs(STACKS[2], "cpu", torch.float64)
    expected = reference_step(given)
    bitkernels.mamba2_stack_step(**given)
    for name, ref in zip(RESULTS, expected, strict=True):
        assert_close(name, given[name], ref)


@pytest.mark.memcheck
@pytest.mark.parametrize("index", [3, 0, -1])
def test_slots(index, device):
    """The token moves the state of its slot; one that has none moves none."""
    stack = KERNEL[2]
    given = stack_inputs(stack, device, slots=5)
    before = copied(given)
    slots = torch.tensor([index], device=device)
    layers = copied(given)
    bitkernels.mamba2_stack_step(**given, state_indices=slots)
    step_layers(layers, slots)
    assert_close("residual", given["residual"], layers["residual"], 3e-2)
    for name in ("conv_state", "ssm_state"):
        others = [i for i in range(5) if i != index]
        assert torch.equal(given[name][:, others], before[name][:, others]), name
        if index in range(5):
            assert_close(name, given[name][:, index], layers[name][:, index], 3e-2)


@pytest.mark.memcheck
@pytest.mark.parametrize("stack", TOKENS, ids=str)
def test_slots_of_tokens(stack, device):
    """Each token moves the states of its own slot, and padding those of none."""
    count = stack.layer.batch
    given = stack_inputs(stack, device, slots=count + 3)
    before = copied(given)
    slots = torch.randperm(count + 3, device=device)[:count]
    slots[count // 2] = -1
    layers = copied(given)
    bitkernels.mamba2_stack_step(**given, state_indices=slots)
    step_layers(layers, slots)
    held = slots[slots >= 0].tolist()
    others = [i for i in range(count + 3) if i not in held]
    assert_close("residual", given["residual"], layers["residual"], 3e-2)
    for name in ("conv_state", "ssm_state"):
        assert torch.equal(given[name][:, others], before[name][:, others]), name
        assert_close(name, given[name][:, held], layers[name][:, held], 3e-2)


@pytest.mark.parametrize("stack", KERNEL, ids=str)
def test_same_bits_every_run(stack, device):
    given = stack_inputs(stack, device)
    runs = [copied(given) for _ in range(20 if device == "cuda" else 2)]
    for run in runs:
        bitkernels.mamba2_stack_step(**run)
    for run in runs[1:]:
        for name in RESULTS:
            assert torch.equal(run[name], runs[0][name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("stack", [ONE_TOKEN[1], TOKENS[2]], ids=str)
def test_not_finite(bad, stack, device):
    """One bad activation reaches every output of its token, and nothing waits for ever."""
    given = stack_inputs(stack, device)
    given["residual"][0, 7] = bad
    bitkernels.mamba2_stack_step(**given)
    assert not given["residual"][0].isfinite().any()
    assert given["residual"][1:].isfinite().all()


def test_noncontiguous(device):
    given = stack_inputs(KERNEL[0], device)
    views = {k: noncontiguous(v) if k in RESULTS else v for k, v in copied(given).items()}
    expected = reference_step(given)
    bitkernels.mamba2_stack_step(**views)
    for name, ref in zip(RESULTS, expected, strict=True):
        assert_close(name, views[name], ref, 3e-2)


def test_opcheck(device):
    given = stack_inputs(KERNEL[0], device)
    flat = [t for layer in given["parameters"] for t in layer]
    args = (given["residual"], flat, given["conv_state"], given["ssm_state"], torch.bfloat16)
    opcheck(torch.ops.bitkernels.mamba2_stack_step.default, args, grad=False)


def test_compile(device):
    given = stack_inputs(KERNEL[1], device)
    other = copied(given)

    def step(residual, conv_state, ssm_state):
        bitkernels.mamba2_stack_step(residual, given["parameters"], conv_state, ssm_state, torch.bfloat16, 1e-3, 1e-4)
        return residual + 1

    expected = step(*(given[name] for name in RESULTS))
    out = torch.compile(step, fullgraph=True)(*(other[name] for name in RESULTS))
    assert torch.equal(out, expected)
    assert torch.equal(other["ssm_state"], given["ssm_state"])


@pytest.mark.parametrize("stack", [ONE_TOKEN[1], TOKENS[1]], ids=str)
def test_cuda_graph(stack, device):
    given = stack_inputs(stack, device)

    def step(residual, conv_state, ssm_state):
        own = [t.clone() for t in (residual, conv_state, ssm_state)]
        bitkernels.mamba2_stack_step(own[0], given["parameters"], *own[1:], torch.bfloat16)
        return own[0]

    if device == "cuda":
        check_cuda_graph(step, [given[name] for name in RESULTS])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": lambda v: v[0]}, r"residual must be \[B, d_model\], got \[384\]"),
        ({"parameters": lambda v: [v[0][:-1], *v[1:]]}, r"parameters\[0\] must be 15 \(in_norm, .*\), got 14"),
        ({"parameters": lambda v: v[:2]}, r"conv_state must have the states of 2 layers, got 3"),
        ({"ssm_state": lambda v: v[:, 0]}, r"ssm_state must be \[L, B, H, P, N\], got \[3, 12, 64, 128\]"),
        ({"parameters": lambda v: [[v[0][0][:-1], *v[0][1:]], *v[1:]]}, r"norm_weight must be of shape \[384\]"),
        ({"parameters": lambda v: [[*v[0][:5], v[0][5].T, *v[0][6:]], *v[1:]]}, r"conv_(weight|start|state) must"),
        ({"conv_state": lambda v: torch.cat([v, v], 1)}, r"conv_state must be of shape \[1, 3, 1024\]"),
    ],
)
def test_errors(change, message, device):
    given = stack_inputs(KERNEL[1], device)
    for name, f in change.items():
        given[name] = f(given[name])
    with pytest.raises(ValueError, match=message):
        bitkernels.mamba2_stack_step(**given)
