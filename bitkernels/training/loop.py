"""The training loop: next-token training of a teacher, distillation of a student."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitkernels.models import BiMambaForCausalLM
from bitkernels.training.losses import distillation_loss, next_token_loss


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The learning rate warms up linearly and falls to ``final_lr`` of its peak as a cosine.

    ``autocast`` is the type of the matmuls' activations (None: fp32); latent weights are always fp32.
    ``objective`` is ``"cross_entropy"`` or ``"kl"`` against a teacher, where there is one.
    """

    steps: int
    batch_size: int = 16
    length: int = 128
    lr: float = 3e-3
    final_lr: float = 0.1
    warmup: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    autocast: torch.dtype | None = None
    objective: str = "cross_entropy"

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.length

    def lr_at(self, step: int) -> float:
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def draw_batch(tokens: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Random windows of length + 1 tokens, [batch_size, length + 1]."""
    if tokens.numel() <= config.length:
        raise ValueError(f"train: the text has {tokens.numel()} tokens, a window needs {config.length + 1}")
    starts = torch.randint(tokens.numel() - config.length, (config.batch_size, 1), generator=generator)
    return tokens[starts + torch.arange(config.length + 1)]


def _loss(model: nn.Module, teacher: nn.Module | None, batch: Tensor, config: TrainConfig) -> Tensor:
    device = batch.device.type
    context = torch.autocast(device, config.autocast) if config.autocast else contextlib.nullcontext()
    with context:
        logits = model(batch[:, :-1])
        if teacher is None:
            return next_token_loss(logits, batch[:, 1:])
        with torch.no_grad():
            target = teacher(batch[:, :-1])
        return distillation_loss(logits, getattr(target, "logits", target), config.objective)


def plan_steps(
    model: BiMambaForCausalLM,
    tokens: Tensor,
    config: TrainConfig,
    seconds: float,
    teacher: nn.Module | None = None,
    measured: int = 5,
) -> int:
    """How many of at most ``config.steps`` steps fit into ``seconds`` on this machine; changes no weight.

    Only a machine too slow for all of them trains a different number, so that elsewhere a run repeats exactly.
    """
    generator = torch.Generator().manual_seed(config.seed)
    times = []
    for _ in range(measured + 1):
        batch = draw_batch(tokens, config, generator).to(model.device)
        start = time.perf_counter()
        _loss(model, teacher, batch, config).backward()
        model.zero_grad(set_to_none=True)
        if batch.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    # The first step loads and compiles what the others use.
    return max(1, min(config.steps, int(seconds / statistics.median(times[1:]))))


def train(
    model: BiMambaForCausalLM,
    tokens: Tensor,  # int64 [T]
    config: TrainConfig,
    teacher: nn.Module | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Trains ``model`` in place: on the next token, or with ``teacher`` on its whole distribution (eq. 6).

    The teacher maps ids [B, T] to logits [B, T, vocab_size], or to an object whose ``logits`` they are.

    ``on_step(step, loss)`` is called after each step; the loss is a tensor, so that reading it, which waits
    for the device, is the caller's choice.
    """
    generator = torch.Generator().manual_seed(config.seed)
    decayed = [p for p in model.parameters() if p.dim() >= 2 and min(p.shape) > 1]
    others = [p for p in model.parameters() if not (p.dim() >= 2 and min(p.shape) > 1)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        batch = draw_batch(tokens, config, generator).to(model.device, non_blocking=True)
        loss = _loss(model, teacher, batch, config)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step, loss.detach())
    model.eval()
