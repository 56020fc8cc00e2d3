"""Text from the model that ships, or the main job: teacher, binary student, packed file, its text, and what it cost."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bitkernels.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from bitkernels.data import encode, read_text, shipped_chapters, shipped_text
from bitkernels.inference.memory import weight_bytes
from bitkernels.inference.text import stream_text
from bitkernels.models import CONFIGS, BiMambaForCausalLM
from bitkernels.nn import pack_, packed_zeros
from bitkernels.training import BigramModel, TrainConfig, perplexity
from bitkernels.training.run import Corpus, fit, prepare, student_of

# Packing changes the order of sums, and rounds the embedding to bf16 on disk.
PACKED_TOLERANCE = 1e-3

_PROMPT = "In the beginning"
_SHIPPED_TOKENS, _SHIPPED_HELD_OUT, _SHIPPED_LENGTH = 200, 8192, 512


class DemoError(RuntimeError):
    """The run finished, and its result is not what it must be."""


@dataclass(frozen=True)
class Budget:
    """How much the demo does: each model trains for its steps, or for fewer that fit into its seconds."""

    config: str
    vocab_size: int
    teacher_steps: int
    teacher_seconds: float
    student_steps: int
    student_seconds: float
    batch_size: int
    length: int
    held_out_tokens: int
    new_tokens: int


BUDGETS = {
    "cpu": Budget("demo", 512, 700, 60.0, 500, 75.0, 8, 128, 32768, 200),
    "cuda": Budget("demo", 512, 700, 12.0, 700, 15.0, 32, 128, 65536, 200),
    "fast": Budget("tiny", 320, 20, 5.0, 20, 5.0, 4, 64, 2048, 32),
}
_TEACHER_LR, _STUDENT_LR = 4e-3, 4e-3


@dataclass(frozen=True)
class Row:
    name: str
    file_bytes: int
    weight_bytes: int
    perplexity: float
    tokens_per_second: float


def generation_rate(model: BiMambaForCausalLM, prompt: torch.Tensor, new_tokens: int) -> float:
    """Tokens a second of one sequence, without the first tokens, which warm up."""
    tokens = model.stream(prompt, max_new_tokens=new_tokens, temperature=0)
    for _ in range(min(8, new_tokens // 2)):
        next(tokens)
    begin = time.perf_counter()
    return sum(1 for _ in tokens) / (time.perf_counter() - begin)


def show_model(console: Console, path: Path, device: torch.device, seed: int = 0, prompt: str = _PROMPT) -> None:
    """Loads the packed model at ``path``, writes text with it as it comes, and says what it takes and how good it is.

    Its perplexity is over chapters of the shipped text that it was not trained on, beside that of a bigram model of
    the other chapters, in the same tokens.
    """
    begin = time.perf_counter()
    checkpoint = load_checkpoint(path, device)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    console.print(
        f"{path.name}: {path.stat().st_size / 1e6:.2f} MB with its tokenizer, {weight_bytes(model) / 1e6:.2f} MB of "
        f"weights in memory, loaded in {time.perf_counter() - begin:.1f} s. Device: {device}.\n"
    )
    start = time.perf_counter()
    options = {"max_new_tokens": _SHIPPED_TOKENS, "temperature": 0.7, "top_p": 0.9}
    options |= {"repetition_penalty": 1.15, "seed": seed}
    for piece in stream_text(checkpoint, prompt, **options):
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n\n{_SHIPPED_TOKENS / (time.perf_counter() - start):,.0f} tokens/s, the prompt included.")

    others, unseen = (encode(tokenizer, text) for text in shipped_chapters())
    held_out = unseen[: _SHIPPED_HELD_OUT + 1]
    ours = perplexity(model, held_out, _SHIPPED_LENGTH)
    bigram = BigramModel(others, model.config.vocab_size).perplexity(held_out)
    console.print(
        f"Perplexity over {len(held_out) - 1:,} tokens of Bible chapters that it was not trained on: {ours:.2f}; of a "
        f"bigram model of the other chapters: {bigram:.2f}. {time.perf_counter() - begin:.0f} s in all."
    )


def run_demo(
    console: Console,
    out: Path,
    device: torch.device,
    text: Path | None = None,
    seed: int = 0,
    fast: bool = False,
    prompt: str = _PROMPT,
) -> list[Row]:
    """Runs the main job, prints as it goes, and returns the table's rows (teacher, latent, packed).

    Raises DemoError where the packed student's perplexity is not the latent student's.
    """
    begin = time.perf_counter()
    budget = BUDGETS["fast" if fast else device.type]
    corpus = prepare(shipped_text() if text is None else read_text(text), vocab_size=budget.vocab_size)
    held_out = corpus.held_out[: budget.held_out_tokens + 1]
    vocab_size = corpus.tokenizer.get_vocab_size()
    console.print(
        f"Text: {len(corpus.train):,} training tokens, {len(held_out):,} held out, vocabulary {vocab_size}. "
        f"Device: {device}."
    )

    torch.manual_seed(seed)
    config = CONFIGS[budget.config].replace(vocab_size=vocab_size)
    teacher = BiMambaForCausalLM(config.replace(binarize="none")).to(device)
    teacher_config = TrainConfig(
        budget.teacher_steps, budget.batch_size, budget.length, _TEACHER_LR, seed=seed, autocast=_autocast(device)
    )
    fit(teacher, corpus, teacher_config, console, "Teacher", budget.teacher_seconds)

    student = student_of(teacher, config.binarize, config.weight_format, config.scales)
    student_config = TrainConfig(
        budget.student_steps, budget.batch_size, budget.length, _STUDENT_LR, seed=seed + 1, autocast=_autocast(device)
    )
    fit(student, corpus, student_config, console, "Student", budget.student_seconds, teacher)

    files = {name: out / f"{name}.safetensors" for name in ("teacher", "student", "packed")}
    save_checkpoint(files["teacher"], teacher, corpus.tokenizer)
    save_checkpoint(files["student"], student, corpus.tokenizer)
    pack_(student)
    save_checkpoint(files["packed"], student, corpus.tokenizer, torch.bfloat16)
    console.print(f"Packed {packed_zeros(student)} exact zeros as +1. Wrote {', '.join(map(str, files.values()))}.")
    del teacher, student

    packed = load_checkpoint(files["packed"], device)
    console.print(f"\nText from {files['packed']} alone:\n")
    for piece in stream_text(packed, prompt, max_new_tokens=budget.new_tokens, temperature=0.7, top_p=0.9, seed=seed):
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print("\n")

    rows = [
        _measure(name, files[file], load_checkpoint(files[file], device), held_out, budget, corpus, prompt)
        for name, file in (("teacher", "teacher"), ("latent student", "student"), ("packed student", "packed"))
    ]
    _print_table(console, rows)
    bigram = BigramModel(corpus.train, vocab_size).perplexity(held_out)
    latent, packed_row = rows[1], rows[2]
    relation = "below" if packed_row.perplexity < bigram else "NOT below"
    console.print(f"Bigram model of the same training text: held-out perplexity {bigram:.2f}.")
    difference = abs(packed_row.perplexity / latent.perplexity - 1)
    console.print(
        f"The packed student is {relation} it, and within {difference:.1e} of the latent student. "
        f"{time.perf_counter() - begin:.0f} s in all."
    )
    if not difference <= PACKED_TOLERANCE:
        raise DemoError(
            f"the packed student's perplexity {packed_row.perplexity:.4f} differs from the latent student's "
            f"{latent.perplexity:.4f} by more than {PACKED_TOLERANCE:g} relative"
        )
    return rows


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.bfloat16 if device.type == "cuda" else None


def _measure(
    name: str, path: Path, checkpoint: Checkpoint, held_out: torch.Tensor, budget: Budget, corpus: Corpus, prompt: str
) -> Row:
    model = checkpoint.model
    ids = torch.tensor([corpus.tokenizer.encode(prompt).ids], device=model.device)
    return Row(
        name,
        path.stat().st_size,
        weight_bytes(model),
        perplexity(model, held_out, budget.length),
        generation_rate(model, ids, budget.new_tokens),
    )


def _print_table(console: Console, rows: list[Row]) -> None:
    table = Table()
    table.add_column("model")
    for heading in ("file", "weight memory", "held-out perplexity", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.file_bytes / 1e6:.2f} MB",
            f"{row.weight_bytes / 1e6:.2f} MB",
            f"{row.perplexity:.4f}",
            f"{row.tokens_per_second:,.0f}",
        )
    console.print(table)
