"""The serving loop: requests join and leave a running batch, each with a state of constant size."""

import gc
import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bitkernels.inference.memory import check_memory, plan_memory
from bitkernels.inference.sampling import MODES, Mode, Sampler, SamplingParams
from bitkernels.models import BiMambaForCausalLM
from bitkernels.models.bimamba import Packed, Slots, consecutive, to_device

_STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Positions are counters of 32 bits.
_MAX_TOKENS = 2**31 - 1
# Rows of a product, up to which the order of a row's sums does not depend on its place (csrc/cuda/warpgroup_plan.cuh).
_MAX_INVARIANT = 256


@dataclass(eq=False)
class Request:
    """One prompt and what the engine made of it so far."""

    prompt: Tensor  # int64 [T], on the CPU
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    finish_reason: Literal["length", "stop", "cancelled", "error"] | None = None
    error: BaseException | None = None
    slot: int | None = None
    read: int = 0  # tokens of the prompt whose reading was launched
    drawn: int = 0  # new tokens whose drawing was launched

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class _Drawn:
    """Tokens on their way to the host."""

    requests: list[Request]
    tokens: Tensor
    arrived: torch.cuda.Event | None


class Engine:
    """Generates for many requests at once.

    ``submit`` requests at any time; every ``step`` reads a chunk of the waiting prompts, then draws a token for each
    request that runs. On a GPU the first token of all is handed out before steps are captured, all in the step after
    it: nothing is compiled or captured when requests join or leave. Not safe for several threads.

    Args:
        model: in eval mode, on its device.
        max_batch: requests that run at once; others wait.
        state_dtype: float32, bfloat16 or float16; 16-bit states are rounded stochastically, by each request's seed.
        prefill_chunk: prompt tokens of a step. Bounds the memory of prompts of any length.
        batch_invariant: every step has one shape, so that a request's tokens do not depend, to the bit, on what runs
            beside it: decoding is padded to ``max_batch``, and prompts are read one at a time; slower. Holds where
            each row of an operator's result depends on its row of the input alone, as in every operator here for up to
            256 rows, which is as many as ``max_batch`` may be on a GPU: the order of larger products' sums may depend
            on a row's place.
        memory_limit: bytes the whole may take, weights included; default: what is free.
        max_tokens: of a request, prompt and new ones together.

    Raises:
        ValueError: an argument is out of range, or the memory does not suffice. Nothing was allocated then.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: BiMambaForCausalLM,
        max_batch: int = 8,
        state_dtype: torch.dtype = torch.float32,
        prefill_chunk: int = 2048,
        batch_invariant: bool = False,
        memory_limit: int | None = None,
        max_tokens: int = _MAX_TOKENS,
    ):
        if state_dtype not in _STATE_DTYPES:
            raise ValueError(
                f"Engine: state_dtype must be one of {', '.join(map(str, _STATE_DTYPES))}, got {state_dtype}"
            )
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk), ("max_tokens", max_tokens)):
            if not 1 <= value <= _MAX_TOKENS:
                raise ValueError(f"Engine: {name} must be in [1, {_MAX_TOKENS}], got {value}")
        if batch_invariant and model.device.type == "cuda" and max_batch > _MAX_INVARIANT:
            raise ValueError(
                f"Engine: max_batch must be at most {_MAX_INVARIANT} on a GPU with batch_invariant, got {max_batch}"
            )
        self.model, self.device, self.vocab_size = model, model.device, model.config.vocab_size
        self.max_batch, self.prefill_chunk, self.max_tokens = max_batch, prefill_chunk, max_tokens
        self.batch_invariant = batch_invariant
        self.memory = plan_memory(model, max_batch, state_dtype, prefill_chunk)
        check_memory(self.memory, self.device, memory_limit, allocated=self.memory.weights)

        self._cache = model.new_cache(max_batch, state_dtype, padding=True)
        self._sampler = Sampler(max_batch, self.vocab_size, self.device)
        self._stochastic = state_dtype != torch.float32
        # A heap: of the lowest slots, those of a batch follow each other whenever they can.
        self._free = list(range(max_batch))
        self._waiting: deque[Request] = deque()  # the first may have been read in part
        self._running: list[Request] = []
        self._drawn: deque[_Drawn] = deque()
        # On a GPU the host reads a step's tokens while the next one runs.
        self._lag = 1 if self.device.type == "cuda" else 0
        self._graphs = _DecodeGraphs(self) if self.device.type == "cuda" else None

    def submit(self, prompt: Sequence[int] | Tensor, params: SamplingParams | None = None) -> Request:
        """Queues a request. Raises ValueError, and queues nothing, where the prompt cannot be read."""
        params = params or SamplingParams()
        ids = torch.as_tensor(prompt).detach().cpu()
        if ids.dim() != 1 or ids.numel() == 0:
            raise ValueError(f"submit: the prompt must hold at least one token id, got shape {list(ids.shape)}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"submit: the prompt must hold integers, got {ids.dtype}")
        if ids.numel() + params.max_new_tokens > self.max_tokens:
            raise ValueError(
                f"submit: {ids.numel()} tokens and {params.max_new_tokens} new ones are more than {self.max_tokens}"
            )
        ids = ids.to(torch.int64, copy=True)
        if bool((wrong := (ids < 0) | (ids >= self.vocab_size)).any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(f"submit: token id {int(ids[at])} at {at}; ids must be in [0, {self.vocab_size})")
        request = Request(ids, params)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request; the tokens that arrived stay. Does nothing where it has ended."""
        self._finish(request, "cancelled")

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running or self._drawn)

    # Without what autograd of an operator costs at every call, which on a GPU takes as long as reading a prompt.
    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int]]:
        """One chunk of prompts and one token of each running request; returns the tokens that arrived meanwhile.

        Where it is interrupted or fails, the requests that run end with ``finish_reason`` "error", since their states
        are unknown. Those that wait go on.
        """
        try:
            self._prefill()
            if self._running and self._graphs is not None and not self._graphs.awaited:
                self._graphs.awaited = True
                return self._collect(0)
            self._decode()
            return self._collect(self._lag if self._running or self._waiting else 0)
        except BaseException as error:
            read = [request for request in self._waiting if request.slot is not None]
            awaited = [request for drawn in self._drawn for request in drawn.requests]
            for request in (*self._running, *read, *awaited):
                self._finish(request, "error", error)
            self._drawn.clear()
            self._free = list(range(self.max_batch))
            raise

    def stream(self, request: Request) -> Iterator[int]:
        """Yields a request's tokens as they arrive, while all others go on. Closing the iterator cancels it."""
        given = 0
        try:
            while True:
                yield from request.tokens[given:]
                given = len(request.tokens)
                if request.finished:
                    break
                while given == len(request.tokens) and not request.finished:
                    self.step()
        finally:
            self.cancel(request)
        if request.error is not None:
            raise RuntimeError("the request was in a batch that failed") from request.error

    def _prefill(self) -> None:
        pieces: list[tuple[Request, Tensor]] = []
        starting: list[Request] = []
        budget = self.prefill_chunk
        while budget and self._waiting and (self._waiting[0].slot is not None or self._free):
            request = self._waiting[0]
            if request.slot is None:
                request.slot = heapq.heappop(self._free)
                starting.append(request)
            piece = request.prompt[request.read : request.read + budget]
            pieces.append((request, piece))
            request.read += piece.numel()
            budget -= piece.numel()
            if request.read == request.prompt.numel():
                self._running.append(self._waiting.popleft())
            if self.batch_invariant:
                break
        if not pieces:
            return
        if starting:
            slots = [request.slot for request in starting]
            slots = consecutive(slots) or slots
            self._cache.conv[:, slots], self._cache.ssm[:, slots] = 0, 0
        packed = Packed.of(
            [piece.numel() for _, piece in pieces],
            [request.slot for request, _ in pieces],
            self.model.config.d_conv,
            self.device,
        )
        ids = to_device(torch.cat([piece for _, piece in pieces]), self.device)
        logits = self.model.prefill_packed(ids, packed, self._cache)
        # What the host does for them now, a GPU does not wait for.
        for request in starting:
            self._join(request)
        # Only the last prompt of a chunk can be unfinished.
        if done := [request for request, _ in pieces if request.read == request.prompt.numel()]:
            tokens = self._sampler.sample(logits[: len(done)], packed.slots[: len(done)], _mode(done))
            self._launched(done, tokens)

    def _join(self, request: Request) -> None:
        seed = request.params.seed
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        self._sampler.join(request.slot, request.params, seed, request.prompt)

    def _decode(self) -> None:
        if not self._running:
            return
        requests = list(self._running)
        slots, mode = [request.slot for request in requests], _mode(requests)
        if self._graphs is not None:
            tokens = self._graphs.replay(slots, mode)
        else:
            slots += [-1] * (self.max_batch - len(slots) if self.batch_invariant else 0)
            indices = to_device(torch.tensor(slots), self.device)
            tokens = self._sampler.sample(self._forward(indices), indices, mode)
        self._launched(requests, tokens[: len(requests)])

    def _forward(self, slots: Tensor) -> Tensor:
        """Reads the last token of each slot; [B] -> logits [B, vocab_size]."""
        sampler = self._sampler
        position = sampler.position[slots]
        states = Slots(slots, *((sampler.seed[slots], position) if self._stochastic else ()))
        logits = self.model.step(sampler.token[slots], self._cache, states)
        sampler.position[slots] = position + 1
        return logits

    def _launched(self, requests: list[Request], tokens: Tensor) -> None:
        """Counts a token that is being drawn for each request; those that need no more leave their slots."""
        arrived = None
        if self.device.type == "cuda":
            host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            tokens = host.copy_(tokens, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._drawn.append(_Drawn(requests, tokens, arrived))
        for request in requests:
            request.drawn += 1
            if request.drawn == request.params.max_new_tokens:
                self._leave(request)

    def _collect(self, lag: int) -> list[tuple[Request, int]]:
        new = []
        while len(self._drawn) > lag:
            drawn = self._drawn.popleft()
            if drawn.arrived is not None:
                drawn.arrived.synchronize()
            for request, token in zip(drawn.requests, drawn.tokens.tolist(), strict=True):
                if request.finished:
                    continue
                request.tokens.append(token)
                new.append((request, token))
                if token in request.params.stop_tokens:
                    self._finish(request, "stop")
                elif len(request.tokens) == request.params.max_new_tokens:
                    self._finish(request, "length")
        return new

    def _finish(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        if not request.finished:
            request.finish_reason, request.error = reason, error
            self._leave(request)

    def _leave(self, request: Request) -> None:
        for queue in (self._waiting, self._running):
            if request in queue:
                queue.remove(request)
        if request.slot is not None:
            heapq.heappush(self._free, request.slot)
            request.slot = None


def _mode(requests: list[Request]) -> Mode:
    return max((request.params.mode for request in requests), key=MODES.index)


class _DecodeGraphs:
    """Decode steps as CUDA graphs, one for each of a few batch sizes; a smaller batch is padded.

    All are captured at the first replay: at the start of a process that takes as long as the first prompt, whose token
    need not wait for it.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        sizes = {engine.max_batch}
        if not engine.batch_invariant:
            sizes |= {2**i for i in range(engine.max_batch.bit_length())}
        self.sizes = sorted(size for size in sizes if size <= engine.max_batch)
        self.slots = {size: torch.full((size,), -1, device=engine.device) for size in self.sizes}
        self.held = {size: [-1] * size for size in self.sizes}
        self.tokens = {size: torch.zeros(size, dtype=torch.int64, device=engine.device) for size in self.sizes}
        self.pool = None  # the memory of the first graph, which all share, since no two run at once
        self.forward: dict[int, torch.cuda.CUDAGraph] = {}
        self.sample: dict[tuple[int, Mode], torch.cuda.CUDAGraph] = {}
        self.awaited = False  # whether the first tokens were handed out, and the next step captures
        self.captured = False

    def _capture_all(self) -> None:
        # The garbage collector must not free an older graph, which would invalidate the capture.
        gc.collect()
        gc.disable()
        try:
            # The largest first: the others fit into its memory.
            for size in reversed(self.sizes):
                self._capture(size)
        finally:
            gc.enable()
        self.captured = True

    def _capture(self, size: int) -> None:
        slots, sampler = self.slots[size], self.engine._sampler

        def forward() -> Tensor:
            return self.engine._forward(slots)

        self.forward[size], logits = self._graph(forward)
        for mode in MODES:

            def sample(mode=mode) -> None:
                self.tokens[size].copy_(sampler.sample(logits, slots, mode))

            self.sample[size, mode], _ = self._graph(sample)

    def _graph(self, call):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # loads and compiles what the capture cannot
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = call()
        self.pool = graph.pool()
        return graph, result

    def replay(self, slots: list[int], mode: Mode) -> Tensor:
        if not self.captured:
            self._capture_all()
        size = next(size for size in self.sizes if size >= len(slots))
        slots = slots + [-1] * (size - len(slots))
        if slots != self.held[size]:
            self.slots[size].copy_(to_device(torch.tensor(slots), self.engine.device))
            self.held[size] = slots
        self.forward[size].replay()
        self.sample[size, mode].replay()
        return self.tokens[size]
