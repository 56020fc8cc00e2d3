"""The report's tables, in Markdown."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitkernels.models import CONFIGS, BiMambaForCausalLM
from bitkernels.nn import pack_
from bitkernels.report.runs import Run
from bitkernels.report.size import (
    full_precision_bytes,
    packed_bytes,
    packed_file_bytes,
    parameter_bits,
    parameter_count,
)
from bitkernels.training.evaluate import Evaluation, evaluate_text
from bitkernels.training.post_training import POST_TRAINING
from bitkernels.training.recipes import RECIPES

# The vocabulary at which the Bi-Mamba paper's table gives the storage of its models.
PAPER_VOCABULARY = 50288
_PAPER_SIZES = ("780m", "1.3b", "2.7b")
_GIB = 2**30


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)) + "\n"


def storage_table(sizes: tuple[str, ...] = _PAPER_SIZES, vocab_size: int = PAPER_VOCABULARY) -> str:
    """Table 7 of the Bi-Mamba paper: GiB in 16 bits, and of the tensors of a packed file, from shapes alone."""
    rows = []
    for size in sizes:
        shape = CONFIGS[size].replace(vocab_size=vocab_size, tie_embeddings=True, weight_format="binary")
        whole = full_precision_bytes(shape.replace(binarize="none"))
        rows.append([f"Mamba-2 {size}", "16 bits", f"{whole / _GIB:.2f}", ""])
        for binarize in ("in_proj", "all"):
            packed = packed_bytes(shape.replace(binarize=binarize))
            rows.append([f"Bi-Mamba {size}", binarize, f"{packed / _GIB:.2f}", f"{1 - packed / whole:.1%}"])
    return markdown(["model", "low-bit", "GiB", "smaller by"], rows)


@dataclass(frozen=True)
class Row:
    """A model of a run, or of a run after rounding, with what it scores on each text."""

    name: str
    recipe: str
    run: Run
    bits: float
    parameters: int
    file_bytes: int | None  # None where the weights are on a grid that no packed format holds
    results: dict[str, Evaluation]  # by text

    def cells(self) -> list[str]:
        tokens, before, seed = self.run.tokens, self.run.start_tokens, self.run.training.get("seed")
        read = "" if tokens is None else f"{before:,} + {tokens:,}" if before else f"{tokens:,}"
        size = "" if self.file_bytes is None else f"{self.file_bytes / 1e6:.2f}"
        scores = [cell for r in self.results.values() for cell in (f"{r.perplexity:.2f}", f"{r.bits_per_byte:.3f}")]
        return [
            self.recipe, self.name, "" if seed is None else str(seed), read,
            f"{self.parameters:,}", f"{self.bits:.4g}", size, *scores,
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The row in types of JSON."""
        values = {"recipe": self.recipe, "run": self.name}
        values |= {"training": self.run.training, "tokens": self.run.tokens, "start_tokens": self.run.start_tokens}
        values |= {"parameters": self.parameters, "parameter_bits": self.bits, "file_bytes": self.file_bytes}
        return values | {"results": {text: asdict(result) for text, result in self.results.items()}}


def rows_of(
    run: Run, texts: dict[str, str], device: torch.device, length: int, tokens: int | None, post_training: bool
) -> Iterator[Row]:
    """The run's row, its low-bit layers packed; with ``post_training`` also those of a full-precision run rounded."""
    checkpoint = run.load(device)
    if texts and checkpoint.tokenizer is None:
        raise ValueError(f"{run.file}: holds no tokenizer")

    def row(name: str, recipe: str, model: BiMambaForCausalLM) -> Row:
        bits, parameters, low_bit = parameter_bits(model), parameter_count(model), model.config.low_bit
        model = pack_(model) if low_bit else model
        results = {
            name: evaluate_text(model, checkpoint.tokenizer, text, length, tokens) for name, text in texts.items()
        }
        rounded = any(hasattr(m, "weight_bits") for m in model.modules())
        size = None if rounded else packed_file_bytes(model)
        return Row(name, recipe, run, bits, parameters, size, results)

    yield row(run.name, run.recipe, checkpoint.model)
    methods = POST_TRAINING.values() if post_training and not run.config.low_bit else ()
    for method in methods:
        yield row(f"{run.name} rounded", method.name, method.apply(copy.deepcopy(checkpoint.model)))


def results_table(rows: list[Row], texts: list[str]) -> str:
    headings = ["recipe", "run", "seed", "tokens", "parameters", "parameter-bits", "file, MB"]
    headings += [heading for text in texts for heading in (f"perplexity, {text}", f"bits per byte, {text}")]
    return markdown(headings, [row.cells() for row in rows])


def parameter_bits_table() -> str:
    """Parameter-bits of every recipe at the Slender-Mamba paper's size (its Tables 2 and 4)."""
    whole = parameter_bits(BiMambaForCausalLM.on_meta(CONFIGS["170m"]))
    rows = []
    for name, recipe in RECIPES.items():
        bits = parameter_bits(BiMambaForCausalLM.on_meta(recipe.config(CONFIGS["170m"])))
        rows.append([name, f"{bits / 1e8:.2f}", f"{1 - bits / whole:.1%}"])
    return markdown(["recipe", "parameter-bits x 1e8", "fewer by"], rows)
