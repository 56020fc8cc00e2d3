"""The steps of a run that the command line is made of: text to tokens, teacher to student, training with a display."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch import Tensor, nn

from bitkernels.data import encode, split_text, train_tokenizer
from bitkernels.models import BiMambaForCausalLM
from bitkernels.training.evaluate import perplexity
from bitkernels.training.loop import TrainConfig, plan_steps, train
from bitkernels.training.recipes import start_from_

# Perplexity while training is an indication, from this many held-out tokens; the table's is from all it is given.
_GLANCE_TOKENS = 8192
_GLANCES = 5


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # int64 [T]
    held_out: Tensor  # int64 [T]
    tokenizer: Tokenizer


def prepare(text: str, tokenizer: Tokenizer | None = None, vocab_size: int = 1024) -> Corpus:
    """Splits and encodes ``text``, with a tokenizer trained on its training part where none is given."""
    train_text, held_out = split_text(text)
    tokenizer = tokenizer or train_tokenizer(train_text, vocab_size)
    return Corpus(encode(tokenizer, train_text), encode(tokenizer, held_out), tokenizer)


def student_of(
    teacher: BiMambaForCausalLM, binarize: str = "all", weight_format: str = "binary", scales: str = "column"
) -> BiMambaForCausalLM:
    """A low-bit model whose latent weights start as the teacher's weights."""
    config = teacher.config.replace(binarize=binarize, weight_format=weight_format, scales=scales)
    return start_from_(BiMambaForCausalLM(config).to(teacher.device), teacher)


def fit(
    model: BiMambaForCausalLM,
    corpus: Corpus,
    config: TrainConfig,
    console: Console,
    title: str,
    seconds: float | None = None,
    teacher: nn.Module | None = None,
) -> TrainConfig:
    """Trains with a progress bar, loss and held-out perplexity; returns the configuration that was used.

    With ``seconds``, the number of steps is lowered to what fits.
    """
    if seconds is not None:
        planned = plan_steps(model, corpus.train, config, seconds, teacher)
        if planned < config.steps:
            console.print(f"{title}: {planned} of {config.steps} steps fit into {seconds:.0f} s on this machine")
        config = replace(config, steps=planned)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  held-out perplexity {task.fields[held_out]:.2f}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=config.steps, loss=float("nan"), held_out=float("nan"))
        train(model, corpus.train, config, teacher, _reporter(model, corpus, config, progress, task, title))
    return config


def _reporter(
    model: BiMambaForCausalLM, corpus: Corpus, config: TrainConfig, progress: Progress, task, title: str
) -> Callable[[int, Tensor], None]:
    glance = corpus.held_out[: _GLANCE_TOKENS + 1]
    every = max(1, config.steps // _GLANCES)
    # Reading a loss waits for the device; a hundred times a run costs nothing.
    read_every = max(1, config.steps // 100)
    begin = time.perf_counter()

    def on_step(step: int, loss: Tensor) -> None:
        done = step + 1
        look = done % every == 0 or done == config.steps
        if done % read_every and not look:
            return
        progress.update(task, completed=done, loss=float(loss))
        if look:
            held_out = perplexity(model, glance, config.length)
            model.train()
            progress.update(task, held_out=held_out)
            rate = done * config.batch_size * config.length / (time.perf_counter() - begin)
            progress.console.print(
                f"{title}: step {done} of {config.steps}, loss {float(loss):.3f}, "
                f"held-out perplexity {held_out:.2f}, {rate:,.0f} tokens/s"
            )

    return on_step


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
