"""Draws docs/<operator>_<machine>.png from benchmarks/results/*.json: packed_linear over the number of tokens M, and
ssd_scan over the length T of a sequence.

Beside ours stand the peers of the same run and the floor: the bytes that a call must move at the bandwidth of a plain
read, or its operations at the best rate that any product of packed_linear's run reached, whichever takes longer.
"""

import json
import math
import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
MOST = 512  # tokens of the curve
FEWEST_POINTS = 10
FEWEST_LENGTHS = 5


def floor(shape: list[int], bytes_per_us: float, operations_per_us: float) -> float:
    """Microseconds of packed_linear with bf16 activations and fp32 column scales."""
    M, N, K = shape
    size = N * -(-K // 32) * 4 + 2 * M * (N + K) + 8 * K
    return max(size / bytes_per_us, 2 * M * N * K / operations_per_us)


def curves(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of the layers that were measured at enough sizes, by layer, in the order of M."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if "shape" in row and row["shape"][0] <= MOST and row.get("dtype") == "torch.bfloat16":
            found.setdefault(row["case"].split(",")[0], []).append(row)
    return {
        layer: sorted(points, key=lambda row: row["shape"][0])
        for layer, points in found.items()
        if len(points) >= FEWEST_POINTS
    }


def times(row: dict) -> dict[str, float]:
    present = {name: peer["us"] for name, peer in row["peers"].items() if "absent" not in peer}
    return {"bitkernels": row["us"], **present}


def limits(rows: list[dict]) -> tuple[float, float] | None:
    """Bytes and operations of a microsecond, by the rows of packed_linear."""
    read = next((row["GB/s"] for row in rows if row["case"] == "memory read"), None)
    sized = [row for row in rows if "shape" in row]
    if read is None:
        return None
    return 1e3 * read, max(2 * math.prod(row["shape"]) / min(times(row).values()) for row in sized)


def panel_of(panel, title: str, axis: str, points: list[tuple[int, dict]], least: list[float]) -> None:
    """Times over sizes, given with their rows, and the floor where it is known."""
    for name in dict.fromkeys(name for _, row in points for name in times(row)):
        line = [(size, times(row)[name]) for size, row in points if name in times(row)]
        panel.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
    sizes = [size for size, _ in points]
    if least:
        panel.plot(sizes, least, "k--", linewidth=1, label="floor")
    ticks = [size for size in sizes if size.bit_count() == 1]
    panel.set(xscale="log", yscale="log", title=title, xlabel=axis, ylabel="us")
    panel.set_xticks(ticks, [str(size) for size in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend()


def draw_linear(machine: str, rows: list[dict], most: tuple[float, float] | None, path: Path) -> None:
    layers = curves(rows)
    figure, panels = plt.subplots(2, -(-len(layers) // 2), figsize=(11, 8), squeeze=False, layout="constrained")
    for panel in panels.flat[len(layers) :]:
        panel.axis("off")
    for panel, (layer, points) in zip(panels.flat, layers.items(), strict=False):
        least = [floor(row["shape"], *most) for row in points] if most else []
        title = f"{layer} {points[0]['shape'][1:]}"
        panel_of(panel, title, "M", [(row["shape"][0], row) for row in points], least)
    figure.suptitle(f"packed_linear, {machine}: time of a call over the number of tokens")
    save(figure, path)


def lengths(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of one sequence of the 2.7B shape, by direction of time, in the order of T."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if match := re.fullmatch(r"2.7B, B=1, T=\d+, (forward\S*)", row["case"]):
            found.setdefault(match[1], []).append(row)
    return {
        direction: sorted(points, key=lambda row: row["shape"][1])
        for direction, points in found.items()
        if len(points) >= FEWEST_LENGTHS
    }


def draw_scan(machine: str, rows: list[dict], most: tuple[float, float] | None, path: Path) -> None:
    directions = lengths(rows)
    figure, panels = plt.subplots(1, len(directions), figsize=(11, 4.5), squeeze=False, layout="constrained")
    for panel, (direction, points) in zip(panels.flat, directions.items(), strict=True):
        # The rows tell bytes and operations by their rates.
        least = [row["us"] * max(1e3 * row["GB/s"] / most[0], 1e6 * row["TFLOP/s"] / most[1]) for row in points if most]
        panel_of(panel, direction, "T", [(row["shape"][1], row) for row in points], least)
    figure.suptitle(f"ssd_scan, {machine}: time over the length of a sequence, 2.7B shape")
    save(figure, path)


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> list[Path]:
    written = []
    for source in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        content = json.loads(source.read_text())
        linear, scan = (content["ops"].get(op, {"rows": []})["rows"] for op in ("packed_linear", "ssd_scan"))
        if content["device"] != "cuda":
            continue
        for op, rows, found, draw in (
            ("packed_linear", linear, curves(linear), draw_linear),
            ("ssd_scan", scan, lengths(scan), draw_scan),
        ):
            if found:
                path = ROOT / "docs" / f"{op}_{source.stem}.png"
                draw(content["machine"], rows, limits(linear), path)
                written.append(path)
    return written


if __name__ == "__main__":
    for path in main():
        print(f"{path.relative_to(ROOT)}: written")
