"""The training loop: next-token training of a teacher, distillation of a student; one process or many."""

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitkernels.data import Batch, Tokens, Windows
from bitkernels.models import BiMambaForCausalLM
from bitkernels.training.captured import CapturedStep
from bitkernels.training.checkpoints import Checkpoints
from bitkernels.training.distributed import (
    average_gradients_,
    clip_gradients_,
    is_sharded,
    mean,
    rank,
    reshard_,
    shard_,
    unique_mixers,
    world_size,
)
from bitkernels.training.losses import training_loss

# Of fields that say how a step is computed, and not what: a run may go on with others.
_HOW = {"how": True}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The learning rate warms up linearly and falls to ``final_lr`` of its peak as a cosine.

    ``warmup`` is a share of all steps, or as an integer a number of steps. ``batch_size`` windows make a step, however
    many processes there are; each process does its share in ``accumulation`` parts, whose gradients add up.
    ``autocast`` is the type of the matmuls' activations (None: fp32); latent weights are always fp32.
    ``objective`` is that of ``distill_loss``, where there is a teacher. ``recompute`` keeps no activations inside the
    blocks, and computes them again in the backward. ``signs_alone`` says whether binary weights, where they are
    sharded, travel as sign bits; with ``replicate`` nothing is sharded: each process holds the model, and gradients are
    averaged. ``capture`` launches a step as one CUDA graph.
    """

    steps: int
    batch_size: int = 16
    length: int = 128
    lr: float = 3e-3
    final_lr: float = 0.1
    warmup: float | int = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    autocast: torch.dtype | None = None
    objective: str = "cross_entropy"
    accumulation: int = field(default=1, metadata=_HOW)
    recompute: bool = field(default=False, metadata=_HOW)
    signs_alone: bool = field(default=True, metadata=_HOW)
    replicate: bool = field(default=False, metadata=_HOW)
    capture: bool = field(default=False, metadata=_HOW)

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.length

    def lr_at(self, step: int) -> float:
        warmup = self.warmup if isinstance(self.warmup, int) else max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))

    def part_size(self, processes: int) -> int:
        """Windows of one part of a process's share."""
        parts = processes * self.accumulation
        if self.batch_size % parts:
            raise ValueError(
                f"train: batch_size {self.batch_size} must be a multiple of processes times accumulation, "
                f"{processes} x {self.accumulation}"
            )
        return self.batch_size // parts


@dataclass(frozen=True)
class Step:
    """What a step left: tensors, so that reading them, which waits for the device, is the caller's choice."""

    done: int  # steps, this one included
    loss: Tensor  # mean over all processes' tokens
    grad_norm: Tensor  # before clipping
    lr: float


def plan_steps(
    model: BiMambaForCausalLM,
    tokens: Tensor | Tokens,
    config: TrainConfig,
    seconds: float,
    teacher: nn.Module | None = None,
    measured: int = 5,
) -> int:
    """How many of at most ``config.steps`` steps fit into ``seconds`` on this machine; changes no weight.

    Only a machine too slow for all of them trains a different number, so that elsewhere a run repeats exactly.
    """
    windows = Windows(tokens, config.length, config.seed)
    times = []
    for step in range(measured + 1):
        start = time.perf_counter()
        for part in _parts(windows, step, config):
            part = part.to(model.device)
            training_loss(model, part.tokens, part.seq_idx, teacher, config.objective, config.autocast).backward()
        model.zero_grad(set_to_none=True)
        if part.tokens.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    # The first step loads and compiles what the others use.
    return max(1, min(config.steps, int(seconds / statistics.median(times[1:]))))


def _parts(windows: Windows, step: int, config: TrainConfig) -> Iterator[Batch]:
    """This process's parts of a step's batch."""
    size = config.part_size(world_size())
    first = step * config.batch_size + rank() * config.accumulation * size
    for part in range(config.accumulation):
        yield windows.batch(first + part * size, size)


@contextlib.contextmanager
def _recomputed(model: BiMambaForCausalLM, recompute: bool) -> Iterator[None]:
    """While it lasts, the blocks keep no activations but their inputs."""
    mixers = unique_mixers(model) if recompute else []
    for mixer in mixers:
        # Nothing in a block is random, and reading the generator's state is not for a graph.
        mixer.forward = functools.partial(
            checkpoint, mixer.forward, use_reentrant=False, preserve_rng_state=False
        )  # fmt: skip
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.forward


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay is for matrices alone, not for norms and scales."""
    decayed = [p for p in model.parameters() if p.dim() >= 2 and min(p.shape) > 1]
    others = [p for p in model.parameters() if not (p.dim() >= 2 and min(p.shape) > 1)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _description(config: TrainConfig, windows: Windows) -> dict[str, Any]:
    """What decides the course of a run, besides the model."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if not f.metadata.get("how")}
    return {**values, "autocast": str(config.autocast), "tokens": len(windows.tokens), "text": windows.checksum}


def train(
    model: BiMambaForCausalLM,
    tokens: Tensor | Tokens,  # int64 [T], or documents, at whose borders the state restarts
    config: TrainConfig,
    teacher: nn.Module | None = None,
    on_step: Callable[[Step], None] | None = None,
    checkpoints: Checkpoints | None = None,
    on_start: Callable[[int], None] | None = None,
) -> None:
    """Trains ``model`` in place: on the next token, or with ``teacher`` on its whole distribution.

    Where ``torch.distributed`` runs several processes, the model is sharded over them (``shard_``) and stays so, unless
    it is to be replicated; every process must call this with equal weights and arguments. The teacher is held whole by
    each.

    With ``checkpoints`` a run that was stopped, at whatever moment, goes on where its last checkpoint is: the batches
    and the random numbers of a step depend on the seed and the step alone, so it repeats the unbroken run's losses to
    the bit on as many processes.

    Args:
        on_step: called after each step.
        checkpoints: where the run's are, or will be.
        on_start: called with the number of steps that were done before.

    Raises:
        ValueError: the batch cannot be shared out, the text is too short, a step cannot be captured, the embedding is
            rounded, or a checkpoint is of another run.
    """
    if model.config.int8_embedding:
        raise ValueError("train: the embedding is rounded to int8, which is for inference")
    config.part_size(world_size())
    windows = Windows(tokens, config.length, config.seed)
    if config.capture and model.device.type != "cuda":
        raise ValueError("train: capture needs a GPU")
    if world_size() > 1 and not config.replicate and not is_sharded(model):
        shard_(model, config.signs_alone)
    reshard_(model)  # of gathered weights the optimiser would have nothing to train
    optimizer = _optimizer(model, config)
    run = _description(config, windows)
    begin = checkpoints.load(run, model, optimizer) if checkpoints else 0
    if on_start is not None:
        on_start(begin)
    model.train()
    devices = [model.device] if model.device.type == "cuda" else []
    update = functools.partial(_update, model, config, teacher, optimizer)
    if config.capture:
        update = CapturedStep(update, optimizer)
    with _recomputed(model, config.recompute), torch.random.fork_rng(devices):
        for step in range(begin, config.steps):
            torch.manual_seed(int(np.random.SeedSequence((config.seed, step, rank())).generate_state(1)[0]))
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)
            reshard_(model)
            loss, norm = update([part.to(model.device) for part in _parts(windows, step, config)])
            done = step + 1
            if on_step is not None:
                on_step(Step(done, loss, norm, config.lr_at(step)))
            if checkpoints is not None and checkpoints.due(done, config.steps):
                checkpoints.save(done, run, model, optimizer)
    model.eval()


def _update(
    model: BiMambaForCausalLM,
    config: TrainConfig,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Batch],
) -> tuple[Tensor, Tensor]:
    """One step; returns its mean loss and the norm of its gradients."""
    total = torch.zeros((), device=model.device)
    for i, part in enumerate(parts):
        if is_sharded(model):  # gradients are reduced once, when they are complete
            model.set_requires_gradient_sync(i == config.accumulation - 1)
        loss = training_loss(model, part.tokens, part.seq_idx, teacher, config.objective, config.autocast)
        (loss / config.accumulation).backward()
        total += loss.detach() / config.accumulation
    if not is_sharded(model):
        average_gradients_(model)
    norm = clip_gradients_(model, config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean(total), norm
