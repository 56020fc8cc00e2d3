from dataclasses import dataclass

import pytest
import torch
from helpers import TOLERANCE, assert_close, check_compile, check_cuda_graph, noncontiguous, opcheck, wide

import bitkernels
from bitkernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


@dataclass
class Case:
    batch: int
    H: int
    P: int
    N: int
    G: int = 1
    D: str = ""  # "H", "HP"
    z: bool = False
    dt_bias: bool = True

    def __str__(self):
        return f"B{self.batch}-H{self.H}-P{self.P}-N{self.N}-G{self.G}{f'-D{self.D}' if self.D else ''}{'-z' * self.z}"


CASES = [
    Case(1, 1, 1, 1),
    Case(1, 4, 64, 128, D="H", z=True),
    Case(3, 4, 33, 17, G=2, D="HP", z=True),
    Case(2, 2, 16, 31, G=2, dt_bias=False),
    Case(2, 6, 32, 64, G=6, D="H"),
    Case(0, 2, 16, 16),
    # So many rows that a lane takes eight of them on a GPU; rows that are no power of two.
    Case(9, 16, 64, 128, D="H", z=True),
    Case(9, 32, 64, 60, G=2, D="HP", z=True),
    Case(64, 32, 64, 8, G=2, dt_bias=False),
]


def inputs(case, device, dtype, state_dtype=None):
    """state, x, dt, A, B, C, D, z, dt_bias"""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    batch, H, P, N, G = case.batch, case.H, case.P, case.N, case.G
    tensors = [
        torch.randn(batch, H, P, N).to(state_dtype or acc),
        torch.randn(batch, H, P).to(dtype),
        (torch.randn(batch, H) * 2 - 2).to(acc),
        (-1 - 15 * torch.rand(H)).to(acc),
        torch.randn(batch, G, N).to(dtype),
        torch.randn(batch, G, N).to(dtype),
        torch.randn(*((H, P) if case.D == "HP" else (H,))).to(acc) if case.D else None,
        torch.randn(batch, H, P).to(dtype) if case.z else None,
        torch.randn(H).to(acc) if case.dt_bias else None,
    ]
    return [None if t is None else t.to(device) for t in tensors]


@pytest.mark.memcheck
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case, dtype, state_dtype, device):
    tensors = inputs(case, device, dtype, state_dtype)
    tensors_ref = wide(*tensors)
    y = bitkernels.ssd_step(*tensors, dt_softplus=True, dt_limit=(0.001, 5.0))
    y_ref = reference.ssd_step(*tensors_ref, dt_softplus=True, dt_limit=(0.001, 5.0))
    assert y.dtype == dtype
    assert tensors[0].dtype == state_dtype
    assert_close("y", y, y_ref)
    assert_close("state", tensors[0], tensors_ref[0])


def test_float64():
    tensors = inputs(CASES[2], "cpu", torch.float64)
    tensors_ref = [t.clone() for t in tensors]
    assert_close("y", bitkernels.ssd_step(*tensors), reference.ssd_step(*tensors_ref))
    assert_close("state", tensors[0], tensors_ref[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_equal_the_scan(dtype, device):
    T, case = 40, Case(2, 4, 32, 16, G=2, D="H", z=True)
    state, _, _, A, _, _, D, _, dt_bias = inputs(case, device, dtype)
    x, z = (torch.randn(2, T, 4, 32, device=device).to(dtype) for _ in range(2))
    B, C = (torch.randn(2, T, 2, 16, device=device).to(dtype) for _ in range(2))
    dt = torch.randn(2, T, 4, device=device)
    y, final_states = bitkernels.ssd_scan(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial_states=state, dt_softplus=True, return_final_states=True
    )
    steps = [
        bitkernels.ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, z[:, t], dt_bias, dt_softplus=True)
        for t in range(T)
    ]
    assert_close("y", torch.stack(steps, 1), y.double(), TOLERANCE[dtype])
    assert_close("state", state, final_states.double(), TOLERANCE[dtype])


def test_noncontiguous(device):
    tensors = inputs(CASES[2], device, torch.float32)
    views = [None if t is None else noncontiguous(t) for t in tensors]
    y, y_views = bitkernels.ssd_step(*tensors), bitkernels.ssd_step(*views)
    assert_close("y", y, y_views.double())
    assert_close("state", tensors[0], views[0].double())


def test_nan_steps_stay(device):
    """A step size that is NaN is not clamped to a limit, as in the scan."""
    state, x, dt, *others = inputs(CASES[1], device, torch.float32)
    dt[0, 1] = torch.nan
    y = bitkernels.ssd_step(state, x, dt, *others, dt_softplus=True)
    for out in (y, state):
        assert out[0, 1].isnan().all()
        assert out[0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_run(state_dtype, device):
    tensors = inputs(CASES[1], device, torch.bfloat16, state_dtype)
    again = [None if t is None else t.clone() for t in tensors]
    assert torch.equal(bitkernels.ssd_step(*tensors), bitkernels.ssd_step(*again))
    assert torch.equal(tensors[0], again[0])


def test_opcheck(device):
    tensors = inputs(Case(2, 2, 4, 3, D="HP", z=True), device, torch.float32)
    opcheck(torch.ops.bitkernels.ssd_step.default, (*tensors, True, 0.001, 1.0), grad=False)


def test_compile_and_cuda_graph(device):
    tensors = inputs(CASES[4], device, torch.float32)

    def function(state, *rest):
        state = state.clone()
        return bitkernels.ssd_step(state, *rest, dt_softplus=True), state

    check_compile(function, tensors)
    if device == "cuda":
        check_cuda_graph(function, tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": torch.ones(2, 4, 16, 7)}, r"ssd_step: state .*got \[2, 4, 16, 7\]"),
        ({"state": torch.ones(2, 4, 16, 8, dtype=torch.int32)}, "ssd_step: state .*Int"),
        ({"x": torch.ones(2, 64)}, r"ssd_step: x must be \[B, H, P\], got \[2, 64\]"),
        ({"dt": torch.ones(2, 3)}, r"ssd_step: dt .*got \[2, 3\]"),
        ({"A": torch.ones(3)}, r"ssd_step: A .*got \[3\]"),
        ({"B": torch.ones(2, 3, 8)}, r"ssd_step: B .*divides 4 heads"),
        ({"C": torch.ones(2, 2, 7)}, r"ssd_step: C .*got \[2, 2, 7\]"),
        ({"D": torch.ones(3)}, r"ssd_step: D .*got \[3\]"),
        ({"z": torch.ones(2, 4, 15)}, r"ssd_step: z .*got \[2, 4, 15\]"),
        ({"dt_bias": torch.ones(3)}, r"ssd_step: dt_bias .*got \[3\]"),
    ],
)
def test_bad_input(change, words, device):
    good = dict(zip(NAMES, inputs(Case(2, 4, 16, 8, G=2, D="H", z=True), device, torch.float32), strict=True))
    with pytest.raises(ValueError, match=words):
        bitkernels.ssd_step(**{**good, **{k: v.to(device) for k, v in change.items()}})


def exact_inputs(device, state_dtype, batch=3, H=4, P=9, N=20):
    """A step whose float32 arithmetic is one exact sum, ``state + B``."""
    state, B = torch.randn(batch, H, P, N).to(state_dtype), torch.randn(batch, 1, N)
    tensors = [state, torch.ones(batch, H, P), torch.ones(batch, H), torch.zeros(H), B, B]
    return [t.to(device) for t in tensors]


def keys(batch, device):
    seed = torch.tensor([-5, 2**40 + 7, 2**62, 11, 12][:batch], device=device)
    return seed, torch.tensor([0, 2**33 + 1, 3, 4, 5][:batch], device=device)


@pytest.mark.memcheck
@pytest.mark.parametrize("state_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("N", [1, 20, 128, 137])
@pytest.mark.parametrize("scale", [1.0, 2.0**-17, 4e4])
def test_stochastic_rounding_bit_by_bit(state_dtype, N, scale, device):
    state, x, dt, A, B, C = exact_inputs(device, state_dtype, N=N)
    B *= scale
    state *= scale
    seed, position = keys(3, device)
    expected = (state.float() + B[:, :, None]).cpu()
    bits = reference.state_random_bits(seed.cpu(), position.cpu(), *state.shape[1:])
    expected = reference.round_stochastically(expected, bits, state_dtype)
    bitkernels.ssd_step(state, x, dt, A, B, C, seed=seed, position=position)
    assert torch.equal(state.cpu(), expected)


@pytest.mark.parametrize("state_dtype", DTYPES[1:], ids=str)
def test_stochastic_rounding_of_many_rows(state_dtype, device):
    state, x, dt, A, B, _ = exact_inputs(device, state_dtype, batch=64, H=32, P=64, N=16)
    B = B.bfloat16()
    seed = torch.arange(64, device=device) * 2**33 - 5
    expected = (state.float() + B[:, :, None].float()).cpu()
    bits = reference.state_random_bits(seed.cpu(), seed.cpu() + 9, *state.shape[1:])
    bitkernels.ssd_step(state, x.bfloat16(), dt, A, B, B, seed=seed, position=seed + 9)
    assert torch.equal(state.cpu(), reference.round_stochastically(expected, bits, state_dtype))


def test_philox_known_answers():
    """From the authors' test vectors."""
    known = [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, (low, high), words in known:
        seed = (high << 32) | low
        seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
        drawn = reference.philox(tuple(torch.tensor(c) for c in counter), seed)
        assert tuple(w.item() for w in drawn) == words


@pytest.mark.parametrize("state_dtype", DTYPES[1:], ids=str)
def test_stochastic_rounding_is_unbiased(state_dtype, device):
    """Additions of a thousandth of a unit in the last place accumulate; to nearest they are lost."""
    T, added = 500, torch.finfo(state_dtype).eps / 1000
    tensors = exact_inputs(device, state_dtype, batch=2, P=64, N=64)
    tensors[0].fill_(1.0)
    tensors[4].fill_(added)
    nearest = tensors[0].clone()
    seed, position = keys(2, device)
    for _ in range(T):
        bitkernels.ssd_step(*tensors, seed=seed, position=position)
        bitkernels.ssd_step(nearest, *tensors[1:])
        position += 1
    assert torch.equal(nearest, torch.ones_like(nearest))
    # A sum of 2^15 draws of a chance of 1/2: six standard deviations of its mean.
    mean = (tensors[0].double().mean().item() - 1) / (T * added)
    assert abs(mean - 1) < 6 / (T / 1000) ** 0.5 / tensors[0].numel() ** 0.5


@pytest.mark.memcheck
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_slots(state_dtype, index_dtype, device):
    """A request updates the slot it names, with the bits of a state of its own; padding and other slots stay."""
    tensors = inputs(Case(5, 4, 33, 17, G=2, D="H", z=True), device, torch.float32, state_dtype)
    slots = torch.tensor([6, -1, 0, 3, -7], dtype=index_dtype, device=device)
    held = [0, 2, 3]
    seed, position = keys(5, device)
    pool = torch.randn(8, 4, 33, 17, device=device).to(state_dtype)
    before = pool.clone()
    own = [t[held] if i in (0, 1, 2, 4, 5, 7) else t for i, t in enumerate(tensors)]
    own[0] = pool[slots[held].long()]
    y = bitkernels.ssd_step(pool, *tensors[1:], state_indices=slots, seed=seed, position=position)
    y_own = bitkernels.ssd_step(*own, seed=seed[held], position=position[held])
    assert torch.equal(y[held], y_own)
    assert torch.equal(y[[1, 4]], torch.zeros_like(y[[1, 4]]))
    assert torch.equal(pool[slots[held].long()], own[0])
    others = [1, 2, 4, 5, 7]
    assert torch.equal(pool[others], before[others])
    pool_ref = before.double().cpu()
    y_ref = reference.ssd_step(pool_ref, *wide(*tensors[1:]), state_indices=slots.cpu())
    assert_close("y", y, y_ref)
    # Stochastic rounding errs by up to a unit in the last place, to nearest by half of it.
    assert_close("state", pool, pool_ref, 2 * TOLERANCE[state_dtype])


@pytest.mark.gpu
@pytest.mark.memcheck
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("P", "N"), [(64, 128), (40, 256)])
def test_much_state(state_dtype, P, N):
    """So much that another kernel moves it: a request gets the bits that it gets among few."""
    H = 16
    batch = 2**25 // (H * P * N) + 3
    tensors = inputs(Case(batch, H, P, N, G=2, D="HP", z=True), "cuda", torch.bfloat16, state_dtype)
    pool, x, dt, A, B, C, D, z, dt_bias = tensors
    slots = torch.randperm(batch, device="cuda")
    before, padding = pool.clone(), slots[1].item()
    slots[1] = -1
    seed = torch.arange(batch, device="cuda") * 2**33 - 5
    position = seed + 9
    y = bitkernels.ssd_step(pool, *tensors[1:], dt_softplus=True, state_indices=slots, seed=seed, position=position)
    assert torch.equal(pool[padding], before[padding])
    double = [t.double() for t in (before, *tensors[1:])]
    y_ref = reference.ssd_step(*double, dt_softplus=True, state_indices=slots)
    assert_close("y", y, y_ref)
    assert_close("state", pool, double[0], 2 * TOLERANCE[state_dtype])

    few = torch.tensor([0, 2, 3, batch - 2, batch - 1], device="cuda")
    own, unusual = before[slots[few]], torch.tensor([torch.inf, torch.nan, -torch.inf], device="cuda").to(state_dtype)
    pool.copy_(before)
    pool[slots[3], 3, :20, 7:10] = own[2, 3, :20, 7:10] = unusual
    keys = {"seed": seed[few], "position": position[few]}
    few_inputs = (x[few], dt[few], A, B[few], C[few], D, z[few], dt_bias)
    bitkernels.ssd_step(pool, *tensors[1:], dt_softplus=True, state_indices=slots, seed=seed, position=position)
    bitkernels.ssd_step(own, *few_inputs, dt_softplus=True, **keys)
    assert own[2, 3, :20, 7:10].isfinite().logical_not().all()
    assert torch.equal(pool[slots[few]].view(torch.uint8), own.view(torch.uint8))


def test_replays_of_a_graph_differ_and_seeds_reproduce(device):
    state, *rest = exact_inputs(device, torch.bfloat16)
    seed, position = keys(3, device)

    def step():
        new = state.clone()
        bitkernels.ssd_step(new, *rest, seed=seed, position=position)
        position.add_(1)
        return new

    if device == "cuda":
        start = position.clone()
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        position.copy_(start)

        def step():
            graph.replay()
            return captured.clone()

    begin = position.clone()
    first, second = step(), step()
    assert not torch.equal(first, second)
    position.copy_(begin)
    assert torch.equal(step(), first)
    seed[0] += 1
    position.copy_(begin)
    reseeded = step()
    assert not torch.equal(reseeded[0], first[0])
    assert torch.equal(reseeded[1:], first[1:])


def test_opcheck_of_slots(device):
    state, *rest = exact_inputs(device, torch.float16)
    seed, position = keys(3, device)
    more = (None, None, None, False, 0.0, None, torch.tensor([2, -1, 0], device=device), seed, position)
    opcheck(torch.ops.bitkernels.ssd_step.default, (state, *rest, *more), grad=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": torch.ones(3, dtype=torch.int64)}, "ssd_step: seed and position must be given together"),
        ({"position": torch.ones(3, dtype=torch.int64)}, "ssd_step: seed and position must be given together"),
        ({"state_indices": torch.ones(3)}, "ssd_step: state_indices must be int32 or int64, got Float"),
        ({"state_indices": torch.ones(2, dtype=torch.int32)}, r"ssd_step: state_indices .*got \[2\]"),
    ],
)
def test_bad_slots(change, words, device):
    tensors = exact_inputs(device, torch.bfloat16)
    with pytest.raises(ValueError, match=words):
        bitkernels.ssd_step(*tensors, **{k: v.to(device) for k, v in change.items()})


def test_bad_keys(device):
    tensors, (seed, position) = exact_inputs(device, torch.bfloat16), keys(3, device)
    with pytest.raises(ValueError, match="ssd_step: seed must be Long, got Int"):
        bitkernels.ssd_step(*tensors, seed=seed.int(), position=position)
    with pytest.raises(ValueError, match=r"ssd_step: position .*got \[2\]"):
        bitkernels.ssd_step(*tensors, seed=seed, position=position[:2])


def test_slot_out_of_range():
    """On a GPU, where reading the indices would wait for it, such a request is padding."""
    tensors = exact_inputs("cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="ssd_step: state_indices must be below the 3 slots of state, got 3"):
        bitkernels.ssd_step(*tensors, state_indices=torch.tensor([0, 3, 1]))
