"""A training step as one CUDA graph."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bitkernels.data import Batch

# Steps that run as they are before one is captured: they compile kernels and make the optimiser's state.
_WARM_STEPS = 2

Update = Callable[[Sequence[Batch]], tuple[Tensor, ...]]


class CapturedStep:
    """``update`` of a step's parts, launched as one graph: small models spend most of a step launching kernels, sharded
    ones in FSDP2.

    ``update`` waits for nothing and always gets parts of the same shapes; it ends with ``optimizer``'s step and leaves
    no gradients. The graph reads the parts and the learning rates from tensors that each call fills.
    """

    def __init__(self, update: Update, optimizer: torch.optim.Optimizer):
        self.update, self.optimizer = update, optimizer
        self.stream = torch.cuda.Stream()
        self.rates = [torch.zeros((), device="cuda") for _ in optimizer.param_groups]
        self.warm = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, parts: Sequence[Batch]) -> tuple[Tensor, ...]:
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self.graph is None and self.warm < _WARM_STEPS:
            self.warm += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream), self._rates_on_device():
                results = self.update(parts)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        if self.graph is None:
            self._capture(parts)
        else:
            for own, part in zip(self.parts, parts, strict=True):
                own.copy_(part)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)  # which the next replay overwrites

    def _capture(self, parts: Sequence[Batch]) -> None:
        self.parts = parts
        torch.cuda.empty_cache()  # of the warm steps' memory, which the graph's is apart from
        graph = torch.cuda.CUDAGraph()
        # The garbage collector must not free an older graph, which would invalidate the capture; and NCCL's watchdog,
        # a thread of its own, may ask for events meanwhile.
        gc.collect()
        gc.disable()
        try:
            with self._rates_on_device(), torch.cuda.graph(
                graph, stream=self.stream, capture_error_mode="thread_local"
            ):  # fmt: skip
                self.results = self.update(parts)
        finally:
            gc.enable()
        self.graph = graph

    @contextlib.contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Only while it lasts does the optimiser hold tensors as its rates: a checkpoint holds numbers."""
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group.update(lr=rate, capturable=True)
        try:
            yield
        finally:
            for group, rate in zip(groups, before, strict=True):
                group.update(lr=rate, capturable=False)
