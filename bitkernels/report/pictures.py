"""The papers' pictures, as PNG files."""

from pathlib import Path

from torch import Tensor

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("bitkernels report needs matplotlib: pip install 'bitkernels[report]'") from error

from bitkernels.models import BiMambaForCausalLM
from bitkernels.report.weights import layer_weights

_BINS = 80
_DPI = 120
_FULL, _LOW = "tab:orange", "tab:blue"  # the papers' colours

Curves = dict[str, tuple[list[float], list[float]]]


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=_DPI)


def weight_histograms(
    path: Path, full: BiMambaForCausalLM, low_bit: BiMambaForCausalLM, names: tuple[str, str]
) -> None:
    """Distributions of every tensor in the first, middle and last layer of two models (Bi-Mamba, Figures 9 to 11)."""
    last = full.config.n_layer - 1
    positions = sorted({0, last // 2, last})
    figure = Figure(figsize=(16, 2.6 * len(positions)), layout="constrained")
    axes = figure.subplots(len(positions), len(layer_weights(full, 0)), squeeze=False)
    for row, position in zip(axes, positions, strict=True):
        pairs = zip(layer_weights(full, position).items(), layer_weights(low_bit, position).values(), strict=True)
        for ax, ((title, before), after) in zip(row, pairs, strict=True):
            values = [before.float().flatten().cpu().numpy(), after.float().flatten().cpu().numpy()]
            span = min(own.min() for own in values), max(own.max() for own in values)
            for own, colour, name in zip(values, (_FULL, _LOW), names, strict=True):
                ax.hist(
                    own, _BINS, range=span, density=True, histtype="stepfilled", alpha=0.6, color=colour, label=name
                )
            ax.set_title(f"layer {position + 1}: {title}", fontsize=8)
            ax.tick_params(labelsize=6)
    axes[0, 0].legend(fontsize=6)
    _save(figure, path)


def curves(path: Path, lines: Curves, x: str, y: str, marker: str = "", log_y: bool = False) -> None:
    """Named lines of (x, y), on a logarithmic x."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        ax.plot(xs, ys, marker=marker, label=name, color=colormaps["tab20"](i % 20))
    ax.set_xscale("log")
    if log_y:
        ax.set_yscale("log")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    _save(figure, path)


def similarity_scatter(path: Path, samples: dict[str, tuple[Tensor, Tensor]], reference: str) -> None:
    """Cosine similarities of the same words in two models (Slender-Mamba, Figure 3)."""
    figure = Figure(figsize=(3.2 * len(samples), 3.4), layout="constrained")
    for ax, (name, (first, second)) in zip(
        figure.subplots(1, len(samples), squeeze=False)[0], samples.items(), strict=True
    ):
        ax.scatter(first.cpu().numpy(), second.cpu().numpy(), s=2, alpha=0.3)
        ax.set_xlabel(reference, fontsize=8)
        ax.set_ylabel(name, fontsize=8)
        ax.tick_params(labelsize=7)
    _save(figure, path)
