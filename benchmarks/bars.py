"""Prints which bars the recorded figures of a GPU clear, and what of them does not; exit 1 where one is missed.

python benchmarks/bars.py nvidia-h200     # reads benchmarks/results/nvidia-h200.json
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import plot

Row = dict
# A case, its figure and the most that it may be.
Figure = tuple[str, float, float]


@dataclass
class Bar:
    op: str
    says: str
    figures: Callable[[list[Row]], Iterator[Figure]]


def peers_of(row: Row, name: str = "") -> Iterator[dict]:
    return (peer for who, peer in row["peers"].items() if who.startswith(name) and "absent" not in peer)


def next_size(rows: list[Row]) -> Iterator[Figure]:
    for points in plot.curves(rows).values():
        for row, larger in pairwise(points):
            yield row["case"], row["us"], 1.1 * larger["us"]


def dense_curve(rows: list[Row]) -> Iterator[Figure]:
    for points in plot.curves(rows).values():
        for row in points:
            yield from ((row["case"], row["us"], 1.05 * peer["us"]) for peer in peers_of(row, "cuBLAS"))


def dense_wide(rows: list[Row]) -> Iterator[Figure]:
    """Activations of 16 bits that are no bf16, and of 32."""
    for row in rows:
        if row.get("dtype") in ("torch.float16", "torch.float32"):
            yield from ((row["case"], row["us"], peer["us"]) for peer in peers_of(row, "cuBLAS"))


def bare_read(rows: list[Row]) -> Iterator[Figure]:
    """The large layer at one token: at least 75 % of the bandwidth of a read of the same bytes."""
    for row in rows:
        if row["case"].startswith("large"):
            yield from ((row["case"], row["us"], peer["us"] / 0.75) for peer in peers_of(row, "bare read"))


def against_peer(pattern: str, share: float, quantity: str = "us") -> Callable[[list[Row]], Iterator[Figure]]:
    """Times, or megabytes, of the cases of a pattern: at most so much of mamba_ssm's."""

    def figures(rows: list[Row]) -> Iterator[Figure]:
        for row in rows:
            if not re.fullmatch(pattern, row["case"]):
                continue
            if quantity == "us":
                yield from ((row["case"], row["us"], share * peer["us"]) for peer in peers_of(row, "mamba_ssm"))
            elif f"mamba_ssm, {quantity}" in row:
                yield row["case"], row[f"bitkernels, {quantity}"], share * row[f"mamba_ssm, {quantity}"]

    return figures


def at_most(pattern: str, limit: float) -> Callable[[list[Row]], Iterator[Figure]]:
    return lambda rows: (
        (row["case"], row.get("value", row.get("us")), limit) for row in rows if re.fullmatch(pattern, row["case"])
    )


def errors(rows: list[Row]) -> Iterator[Figure]:
    for row in rows:
        yield from ((row["case"], row["value"], 1.1 * peer["value"]) for peer in peers_of(row))


BARS = [
    Bar("packed_linear", "no call takes 10 % longer than one of the next size", next_size),
    Bar("packed_linear", "up to 512 tokens, at most 1.05 times cuBLAS", dense_curve),
    Bar("packed_linear", "the large layer, M = 1: 75 % of the bandwidth of a bare read", bare_read),
    Bar("packed_linear", "fp16 and fp32, up to 32 tokens: no slower than cuBLAS in that type", dense_wide),
    Bar("ternary_linear", "fp16 and fp32, up to 32 tokens: no slower than cuBLAS in that type", dense_wide),
    Bar("ssd_scan", "N = 64: 1.5 times as fast as mamba_ssm", against_peer(".*N=64.*", 1 / 1.5)),
    Bar("ssd_scan", "memory of forward and backward at B = 8: at most 0.7 of mamba_ssm's",
        against_peer("2.7B, B=8, T=2048, forward.backward", 0.7, "MB")),
    Bar("ssd_scan_accuracy", "errors at most 1.1 times mamba_ssm's", errors),
    Bar("ssd_scan_call", "a forward call takes 60 us of CPU time", at_most(".*CPU time", 60)),
    Bar("ssd_scan_call", "the backward takes a third of mamba_ssm's wall clock", against_peer(".*wall clock", 1 / 3)),
    Bar("first_call", "ssd_scan, compiled: 5 s", at_most("ssd_scan.*nothing in Triton's cache", 5)),
    Bar("first_call", "ssd_scan, compiled before: 0.1 s", at_most("ssd_scan.*(fresh process|further shapes)", 0.1)),
    Bar("first_call", "packed and ternary products: 2 s", at_most("(packed|ternary)_linear.*", 2)),
]  # fmt: skip


def main(machine: str) -> int:
    ops = json.loads((plot.ROOT / "benchmarks" / "results" / f"{machine}.json").read_text())["ops"]
    missed = 0
    for bar in BARS:
        figures = list(bar.figures(ops.get(bar.op, {"rows": []})["rows"]))
        # Written so that a NaN is a miss.
        over = [figure for figure in figures if not figure[1] <= figure[2]]
        missed += len(over)
        state = "not measured" if not figures else f"{len(over)} of {len(figures)} miss it" if over else "clear"
        tightest = f"; tightest {max(value / limit for _, value, limit in figures):.2f} of it" if figures else ""
        print(f"{bar.op}: {bar.says}: {state}{tightest}")
        for case, value, limit in over:
            print(f"    {case}: {value:.4g} above {limit:.4g}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
