"""How everything here is timed.

A contender is timed over copies of its inputs that together exceed the cache several times, so weights come
from memory, as they do in a model. On a GPU the calls on all copies form one CUDA graph; its replays are timed
with events, unless the wall clock is meant. On a CPU they run one after the other and each is timed, so that a call
that was interrupted is one sample and not a share of all. Rounds of the contenders alternate, so that a machine that
slows down slows all of them.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# [N, K] of the projections, by model.
LAYERS = {
    "780M in_proj": (6448, 1536),
    "780M out_proj": (1536, 3072),
    "2.7B in_proj": (10576, 2560),
    "2.7B out_proj": (2560, 5120),
    "large": (28672, 8192),
}
# Heads of the scan; headdim 64, state 128, one group.
HEADS = {"780M": 48, "2.7B": 80}
HEADDIM, STATE = 64, 128

# rms_error beyond which a result counts as wrong and is not timed.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

Call = Callable[[], object]


@dataclass
class Contender:
    """``make`` returns a call on fresh copies of its inputs, which together move ``nbytes``.

    ``wall``: timed by the host's clock, also on a GPU, with whatever the host does; one call unless ``copies`` says how
    many follow each other, each timed. ``copies``: how many, where the harness should not choose.
    """

    name: str
    make: Callable[[], Call]
    nbytes: int
    wall: bool = False
    copies: int | None = None


@dataclass
class Absent:
    """A peer that cannot be measured here, and why."""

    name: str
    reason: str


def device_of(config) -> str:
    """What this pytest run times on."""
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def verify(out: Tensor, ref: Tensor, tolerance: float | None = None) -> None:
    limit = TOLERANCE[out.dtype] if tolerance is None else tolerance
    error = rms_error(out, ref)
    if not error <= limit:
        raise AssertionError(f"wrong result, not timed: error {error:.3g} above {limit:.3g}")


def rms_error(out: Tensor, ref: Tensor) -> float:
    """``rms(out - ref) / rms(ref)``."""
    out, ref = out.detach().double(), ref.detach().double()
    return ((out - ref).square().mean().sqrt() / ref.square().mean().sqrt()).item()


def cache_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    largest = max((int(s.rstrip("KM")) * (1024 if s.endswith("K") else 2**20) for s in sizes), default=32 * 2**20)
    # A virtual machine reports the cache of the whole host, of which it has a part.
    return min(largest, 64 * 2**20)


class Rounds:
    """Times a contender round by round; ``times`` holds the microseconds of one call."""

    def __init__(self, contender: Contender, device: str):
        self.times: list[float] = []
        if contender.wall:
            self.calls = [contender.make() for _ in range(contender.copies or 1)]
            self.round = self._wall_round
            return
        copies = min(512, math.ceil(4 * cache_bytes(device) / contender.nbytes))
        copies = self._affordable(contender.make(), copies) if device == "cpu" else max(4, copies)
        self.calls = [contender.make() for _ in range(contender.copies or copies)]
        self.round = self._cpu_round if device == "cpu" else self._gpu_round
        if device == "cuda":
            self._capture()

    @staticmethod
    def _affordable(call: Call, copies: int) -> int:
        """A slow call sees few copies: a round is to take about a fifth of a second."""
        call()
        begin = time.perf_counter()
        call()
        return max(2, min(copies, int(0.2 / (time.perf_counter() - begin))))

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles and tunes whatever compiles and tunes
            for call in (self.calls[0], self.calls[0], self.calls[-1]):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # An older graph that the garbage collector frees now would invalidate the capture.
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.graph(self.graph):
                # Outputs are kept, or every call would write the same memory.
                self.outputs = [call() for call in self.calls]
        finally:
            gc.enable()
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def _gpu_round(self) -> None:
        self.begin.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        self.times.append(1e3 * self.begin.elapsed_time(self.end) / len(self.calls))

    def _cpu_round(self) -> None:
        for call in self.calls:
            begin = time.perf_counter()
            call()
            self.times.append(1e6 * (time.perf_counter() - begin))

    def _wall_round(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._cpu_round()

    def summary(self) -> dict:
        times = torch.tensor(self.times, dtype=torch.float64)
        p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        return {"us": round(median, 3), "p20": round(p20, 3), "p80": round(p80, 3)}


def memory_read(device: str = "cpu") -> Contender:
    """A sum over a gigabyte of integers, which takes as long as memory takes to deliver them."""
    buffer = torch.ones(2**27, dtype=torch.int64, device=device)
    return Contender("memory read", lambda: buffer.sum, nbytes(buffer))


def compare(
    benchmark,
    device: str,
    ours: Contender,
    peers: list[Contender | Absent],
    flops: float,
    weight_bytes: int = 0,
    rounds: int | None = None,
) -> dict:
    """Times ours through pytest-benchmark, the peers between its rounds, and returns a row of results.

    On a CPU a row with ``weight_bytes`` also tells the bandwidth of reading memory, measured between the same rounds,
    and how many per cent of it the weights alone make.
    """
    mine = Rounds(ours, device)
    others = {p.name: Rounds(p, device) for p in peers if isinstance(p, Contender)}
    read = memory_read() if weight_bytes and device == "cpu" else None
    if read:
        others[read.name] = Rounds(read, device)
    for each in (mine, *others.values()):  # a first round warms up
        each.round()
        each.times.clear()

    def peers_round() -> None:
        for other in others.values():
            other.round()

    benchmark.pedantic(mine.round, setup=peers_round, rounds=rounds or (20 if device == "cuda" else 5), iterations=1)
    row = mine.summary()
    row["GB/s"] = round(ours.nbytes / row["us"] / 1e3, 1)
    row["TFLOP/s"] = round(flops / row["us"] / 1e6, 3)
    if read:
        bandwidth = read.nbytes / others[read.name].summary()["us"]
        row["read GB/s"] = round(bandwidth / 1e3, 1)
        row["% of read"] = round(100 * weight_bytes / row["us"] / bandwidth, 1)
    row["peers"] = {}
    for peer in peers:
        if isinstance(peer, Absent):
            row["peers"][peer.name] = {"absent": peer.reason}
        else:
            times = others[peer.name].summary()
            row["peers"][peer.name] = {**times, "speedup": round(times["us"] / row["us"], 2)}
    return row


def peak_megabytes(call: Call) -> float | None:
    """What the GPU's allocator hands out during a call, at most, above what it held before."""
    if not torch.cuda.is_available():
        return None
    call()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def quantity(case: str, unit: str, ours: float, peers: dict[str, float | str] | None = None, **columns) -> dict:
    """A row of something other than time of which less is better, too; a peer's reason stands for one not measured."""
    against = {
        name: {"absent": theirs} if isinstance(theirs, str) else {"value": theirs, "ratio": round(theirs / ours, 3)}
        for name, theirs in (peers or {}).items()
    }
    return {"case": case, "unit": unit, "value": ours, **columns, "peers": against, "headline": False}


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def on_copies(function: Callable, *args, **kwargs) -> Callable[[], Call]:
    """A ``make`` of a contender: each call of it clones every tensor argument."""

    def make() -> Call:
        def fresh(a):
            return a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a

        own = [fresh(a) for a in args]
        own_kwargs = {k: fresh(a) for k, a in kwargs.items()}
        return lambda: function(*own, **own_kwargs)

    return make


def with_gradients(function: Callable) -> Callable:
    """Forward and backward: the gradients of every argument that takes one, for a fixed output gradient.

    A random one, made at the first call: a matrix of ones costs the tensor cores less power and therefore less time.
    """
    gradients = []

    def both(*args, **kwargs):
        leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
        y = function(*args, **kwargs)
        if not gradients:
            gradients.append(torch.randn_like(y))
        return torch.autograd.grad(y, leaves, gradients[0])

    return both
