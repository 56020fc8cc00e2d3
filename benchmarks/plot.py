"""Draws docs/packed_linear_<machine>.png from benchmarks/results/*.json: what packed_linear costs at every M.

Beside it stand the peers of the same run and the floor: the bytes that a call must move at the bandwidth of a plain
read, or its operations at the best rate that any product of the run reached, whichever takes longer.
"""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
MOST = 512  # tokens of the curve
FEWEST_POINTS = 10


def floor(shape: list[int], bytes_per_us: float, operations_per_us: float) -> float:
    """Microseconds of packed_linear with bf16 activations and fp32 column scales."""
    M, N, K = shape
    size = N * -(-K // 32) * 4 + 2 * M * (N + K) + 8 * K
    return max(size / bytes_per_us, 2 * M * N * K / operations_per_us)


def curves(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of the layers that were measured at enough sizes, by layer, in the order of M."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if "shape" in row and row["shape"][0] <= MOST:
            found.setdefault(row["case"].split(",")[0], []).append(row)
    return {
        layer: sorted(points, key=lambda row: row["shape"][0])
        for layer, points in found.items()
        if len(points) >= FEWEST_POINTS
    }


def times(row: dict) -> dict[str, float]:
    present = {name: peer["us"] for name, peer in row["peers"].items() if "absent" not in peer}
    return {"bitkernels": row["us"], **present}


def draw(machine: str, rows: list[dict], path: Path) -> None:
    layers = curves(rows)
    read = next((row["GB/s"] for row in rows if row["case"] == "memory read"), None)
    sized = [row for row in rows if "shape" in row]
    best = max(2 * row["shape"][0] * row["shape"][1] * row["shape"][2] / min(times(row).values()) for row in sized)
    figure, panels = plt.subplots(2, -(-len(layers) // 2), figsize=(11, 8), squeeze=False, layout="constrained")
    for panel in panels.flat[len(layers) :]:
        panel.axis("off")
    for panel, (layer, points) in zip(panels.flat, layers.items(), strict=False):
        for name in dict.fromkeys(name for row in points for name in times(row)):
            line = [(row["shape"][0], times(row)[name]) for row in points if name in times(row)]
            panel.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
        if read:
            least = [floor(row["shape"], 1e3 * read, best) for row in points]
            panel.plot([row["shape"][0] for row in points], least, "k--", linewidth=1, label="floor")
        ticks = [row["shape"][0] for row in points if row["shape"][0].bit_count() == 1]
        panel.set(xscale="log", yscale="log", title=f"{layer} {points[0]['shape'][1:]}", xlabel="M", ylabel="us")
        panel.set_xticks(ticks, [str(M) for M in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"packed_linear, {machine}: time of a call over the number of tokens")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> list[Path]:
    written = []
    for source in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        content = json.loads(source.read_text())
        rows = content["ops"].get("packed_linear", {"rows": []})["rows"]
        if content["device"] == "cuda" and curves(rows):
            path = ROOT / "docs" / f"packed_linear_{source.stem}.png"
            draw(content["machine"], rows, path)
            written.append(path)
    return written


if __name__ == "__main__":
    for path in main():
        print(f"{path.relative_to(ROOT)}: written")
