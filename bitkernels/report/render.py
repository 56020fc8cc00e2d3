"""From runs to ``report.md``, its pictures, and ``report.json``."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from bitkernels.checkpoint import atomic_file
from bitkernels.data import read_text
from bitkernels.models import BiMambaForCausalLM
from bitkernels.report import pictures
from bitkernels.report.runs import Run, read_run
from bitkernels.report.tables import (
    PAPER_VOCABULARY,
    Row,
    markdown,
    parameter_bits_table,
    results_table,
    rows_of,
    storage_table,
)
from bitkernels.report.weights import compare_embeddings, effective_weight, sample_similarities

_SCATTER_PAIRS = 4000


def write_report(
    paths: list[Path],
    texts: list[Path],
    out: Path,
    device: torch.device,
    length: int = 512,
    tokens: int | None = None,
    post_training: bool = False,
) -> None:
    """Writes ``report.md``, PNG pictures, and the table of results as ``report.json`` to ``out``.

    Args:
        paths: of runs (see ``read_run``). The first full-precision one of a shape is what low-bit ones are compared to.
        texts: held-out texts, on which every model is evaluated.
        out: a folder, made where it does not exist.
        device: where models are evaluated.
        length: tokens of an evaluated window.
        tokens: of each text, at most so many.
        post_training: add the post-training baselines of full-precision runs.
    """
    out.mkdir(parents=True, exist_ok=True)
    runs = [read_run(path) for path in paths]
    contents = {path.stem.removesuffix(".txt"): read_text(path) for path in texts}
    rows = [row for run in runs for row in rows_of(run, contents, device, length, tokens, post_training)]
    parts = [
        "# Report\n",
        "## Results\n",
        "Low-bit layers are packed, and files hold no tokenizer. Parameter-bits count 1 or 1.58 for a low-bit weight, "
        "with a share of the scales where groups have them, and 16 for any other parameter.\n",
        results_table(rows, list(contents)),
        *_training_curves(runs, out),
        *_frontier(rows, out),
        *_weights(runs, out),
        *_embeddings(runs, out, device),
        "## Storage\n",
        f"The Bi-Mamba paper's sizes at a vocabulary of {PAPER_VOCABULARY}; the tensors of a packed file.\n",
        storage_table(),
        "Parameter-bits at the Slender-Mamba paper's size.\n",
        parameter_bits_table(),
    ]
    with atomic_file(out / "report.md") as temporary:
        temporary.write_text("\n".join(parts))
    write_rows(out / "report.json", [row.to_dict() for row in rows], device, length)


def write_rows(path: Path, rows: list[dict[str, Any]], device: torch.device, length: int) -> None:
    """Rows of results (``Row.to_dict``) with what they depend on: the device, torch, and the tokens of a window."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    content = {"machine": machine, "torch": torch.__version__, "length": length, "rows": rows}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _picture(title: str, file: str, text: str) -> list[str]:
    return [f"## {title}\n", f"{text}\n", f"![{title}]({file})\n"]


def _training_curves(runs: list[Run], out: Path) -> list[str]:
    lines = {run.name: run.curve("held_out_perplexity") for run in runs}
    lines = {name: line for name, line in lines.items() if line[0]}
    if not lines:
        return []
    pictures.curves(out / "perplexity.png", lines, "training tokens", "held-out perplexity", ".", log_y=True)
    return _picture("Perplexity against tokens", "perplexity.png", "Held-out perplexity, as measured while training.")


def _loss(row: Row) -> float | None:
    """On the first text, or without texts the last that was measured while training. Not the training loss: those of
    several objectives cannot be compared."""
    if row.results:
        return math.log(next(iter(row.results.values())).perplexity)
    measured = row.run.curve("held_out_perplexity")[1] if row.recipe == row.run.recipe else []
    return math.log(measured[-1]) if measured else None


def _frontier(rows: list[Row], out: Path) -> list[str]:
    """Bits against loss; the runs of one recipe, of several sizes, make a line."""
    lines: pictures.Curves = {}
    for row in sorted(rows, key=lambda row: row.bits):
        if (loss := _loss(row)) is not None:
            xs, ys = lines.setdefault(row.recipe, ([], []))
            xs.append(row.bits)
            ys.append(loss)
    if not lines:
        return []
    pictures.curves(out / "frontier.png", lines, "parameter-bits", "held-out loss, nats a token", "o")
    text = "The held-out loss of each model, on the first text where there is one; a line for each recipe."
    return _picture("Parameter-bits against loss", "frontier.png", text)


def _reference(run: Run, runs: list[Run]) -> Run | None:
    """The full-precision run of the same shape."""
    shape = ("vocab_size", "d_model", "n_layer", "expand", "headdim", "d_state", "ngroups", "d_conv")
    for other in runs:
        same = all(getattr(other.config, name) == getattr(run.config, name) for name in shape)
        if same and not other.config.low_bit:
            return other
    return None


def _weights(runs: list[Run], out: Path) -> list[str]:
    parts = []
    for run in runs:
        reference = _reference(run, runs)
        if run.config.binarize == "none" or reference is None:
            continue
        file = f"weights-{run.name}.png"
        full, low_bit = reference.load().model, run.load().model
        pictures.weight_histograms(out / file, full, low_bit, (reference.name, run.name))
        parts.append(f"![Weights of {run.name}]({file})\n")
    text = "Distributions in full precision and in low bits, projections after rescaling.\n"
    return ["## Weights\n", text, *parts] if parts else []


def _table(model: BiMambaForCausalLM, device: torch.device) -> torch.Tensor:
    return effective_weight(model.embedding).to(device)


def _embeddings(runs: list[Run], out: Path, device: torch.device) -> list[str]:
    """Each run's word distances against those of the full-precision run of its shape."""
    pairs = [(run, _reference(run, runs)) for run in runs]
    pairs = [(run, other) for run, other in pairs if other is not None and other is not run]
    cells, samples = [], {}
    for run, reference in pairs:
        first, second = _table(reference.load().model, device), _table(run.load().model, device)
        found = compare_embeddings(first, second)
        cells.append([
            f"{reference.name} and {run.name}", f"{found.l2:.1f}", f"{found.rms:.4f}", f"{found.correlation:.3f}",
        ])  # fmt: skip
        samples[run.name] = sample_similarities(first, second, _SCATTER_PAIRS)
    if not cells:
        return []
    pictures.similarity_scatter(out / "embeddings.png", samples, "full precision")
    text = "Cosine similarities of all pairs of words, in full precision and after training in low bits."
    return [
        *_picture("Embeddings", "embeddings.png", text),
        markdown(["runs", "L2 distance", "rms of a pair", "correlation"], cells),
    ]
