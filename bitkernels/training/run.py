"""The steps of a run that the command line is made of: text to tokens, teacher to student, training with a display."""

import hashlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch import Tensor, nn

from bitkernels.checkpoint import atomic_file
from bitkernels.data import Tokens, documents, encode, split_text, token_cache, train_tokenizer
from bitkernels.data.documents import Dataset
from bitkernels.data.tokenizer import TRAINING_CHARACTERS
from bitkernels.models import BiMambaForCausalLM
from bitkernels.training.checkpoints import Checkpoints
from bitkernels.training.distributed import first_process_first, rank, world_size
from bitkernels.training.evaluate import perplexity
from bitkernels.training.loop import Step, TrainConfig, plan_steps, train
from bitkernels.training.metrics import Metrics
from bitkernels.training.recipes import start_from_

# Perplexity while training is an indication, from this many held-out tokens; the table's is from all it is given.
_GLANCE_TOKENS = 8192
_GLANCES = 5


@dataclass(frozen=True)
class Corpus:
    train: Tensor | Tokens  # int64 [T], or documents
    held_out: Tensor  # int64 [T]
    tokenizer: Tokenizer


def prepare(text: str, tokenizer: Tokenizer | None = None, vocab_size: int = 1024) -> Corpus:
    """Splits and encodes ``text``, with a tokenizer trained on its training part where none is given."""
    train_text, held_out = split_text(text)
    tokenizer = tokenizer or train_tokenizer(train_text, vocab_size)
    return Corpus(encode(tokenizer, train_text), encode(tokenizer, held_out), tokenizer)


def prepare_files(
    train: Sequence[str | Path | Dataset],
    held_out: Sequence[str | Path | Dataset],
    cache: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    vocab_size: int = 4096,
    column: str = "text",
) -> Corpus:
    """Encodes files, folders or datasets (``bitkernels.data.documents``) once, into ``cache``; every process calls it.

    ``tokenizer`` is one of the ``tokenizers`` library or its JSON file; without it, one is trained on the start of
    ``train`` and kept in the cache, by its training text and size.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = Tokenizer.from_file(str(tokenizer))
    with first_process_first():
        tokenizer = tokenizer or _cached_tokenizer(train, Path(cache), vocab_size, column)
        parts = [token_cache(part, tokenizer, cache, column) for part in (train, held_out)]
    return Corpus(parts[0], torch.from_numpy(parts[1].tokens.astype(np.int64)), tokenizer)


def _cached_tokenizer(sources: Sequence[str | Path | Dataset], cache: Path, vocab_size: int, column: str) -> Tokenizer:
    texts, size = [], 0
    for text in itertools.chain.from_iterable(documents(source, column) for source in sources):
        texts.append(text)
        size += len(text)
        if size >= TRAINING_CHARACTERS:
            break
    text = "".join(texts)
    key = hashlib.sha256(f"{vocab_size}\n{text}".encode()).hexdigest()[:32]
    path = cache / f"tokenizer-{key}.json"
    if not path.exists():
        with atomic_file(path) as temporary:
            train_tokenizer(text, vocab_size).save(str(temporary))
    return Tokenizer.from_file(str(path))


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
    run: str | Path | None = None,
    checkpoint_every: int = 500,
    log_every: int = 10,
) -> TrainConfig:
    """Trains with a progress bar, loss and held-out perplexity; returns the configuration that was used.

    With ``seconds``, the number of steps is lowered to what fits. With ``run``, a folder, metrics are written to it
    every ``log_every`` steps and checkpoints every ``checkpoint_every``; a run that was stopped goes on from there.
    """
    if seconds is not None:
        if run is not None or world_size() > 1:
            raise ValueError("fit: a time limit is for one process and a run that is not taken up again")
        planned = plan_steps(model, corpus.train, config, seconds, teacher)
        if planned < config.steps:
            console.print(f"{title}: {planned} of {config.steps} steps fit into {seconds:.0f} s on this machine")
        config = replace(config, steps=planned)
    checkpoints = None if run is None else Checkpoints(run, checkpoint_every)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  held-out perplexity {task.fields[held_out]:.2f}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=rank() > 0) as progress:
        task = progress.add_task(title, total=config.steps, loss=float("nan"), held_out=float("nan"))
        reporter = Reporter(model, corpus, config, progress, task, title, run, log_every)
        try:
            train(model, corpus.train, config, teacher, reporter.on_step, checkpoints, reporter.on_start)
        finally:
            reporter.close()
    return config


class Reporter:
    """Shows and writes what training does. The first process reports; all take part in what is computed for it."""

    def __init__(
        self, model: BiMambaForCausalLM, corpus: Corpus, config: TrainConfig, progress: Progress, task: TaskID,
        title: str, run: str | Path | None, log_every: int,
    ):  # fmt: skip
        self.model, self.config, self.progress, self.task, self.title = model, config, progress, task, title
        self.run, self.log_every, self.metrics = run, log_every, None
        self.glance = corpus.held_out[: _GLANCE_TOKENS + 1]
        self.look_every = max(1, config.steps // _GLANCES)
        # Reading a loss waits for the device; a hundred times a run costs nothing.
        self.read_every = max(1, config.steps // 100)

    def on_start(self, done: int) -> None:
        if self.run is not None and rank() == 0:
            self.metrics = Metrics(self.run, done)
        if done:
            self.progress.console.print(f"{self.title}: goes on after step {done}")
        self.progress.update(self.task, completed=done)
        self.begin, self.before = time.perf_counter(), done

    def on_step(self, step: Step) -> None:
        done, steps = step.done, self.config.steps
        log = self.run is not None and (done % self.log_every == 0 or done == steps)
        look = done % self.look_every == 0 or done == steps
        if not log and not look and done % self.read_every:
            return
        loss = float(step.loss)
        rate = (done - self.before) * self.config.batch_size * self.config.length / (time.perf_counter() - self.begin)
        self.progress.update(self.task, completed=done, loss=loss)
        values = {"loss": loss, "lr": step.lr, "grad_norm": float(step.grad_norm), "tokens_per_second": rate}
        if look:
            values["held_out_perplexity"] = held_out = perplexity(self.model, self.glance, self.config.length)
            self.progress.update(self.task, held_out=held_out)
            self.progress.console.print(
                f"{self.title}: step {done} of {steps}, loss {loss:.3f}, "
                f"held-out perplexity {held_out:.2f}, {rate:,.0f} tokens/s"
            )
        if self.metrics is not None and (log or look):
            self.metrics.report(done, **values)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
