"""Writes the tables of README.md and docs/benchmarks.md from benchmarks/results/*.json.

python benchmarks/render.py            # write
python benchmarks/render.py --check    # exit 1 if a page differs from the results
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
DIGITS = 3


def figure(value: float) -> str:
    """Three significant digits, in plain notation."""
    if value == 0:
        return ""
    whole = f"{value:.0f}"
    if len(whole.lstrip("-")) >= DIGITS:
        return whole
    return f"{value:.{DIGITS}g}"


def peer_cells(row: dict, names: list[str]) -> list[str]:
    cells = []
    for name in names:
        peer = row["peers"].get(name)
        if peer is None:
            cells.append("")
        elif "absent" in peer:
            cells.append("absent")
        elif "value" in peer:
            cells.append(f"{figure(peer['value'])} ({figure(peer['ratio'])}x)")
        else:
            cells.append(f"{figure(peer['us'])} ({figure(peer['speedup'])}x)")
    return cells


def table(rows: list[dict]) -> list[str]:
    """One line a case; a peer's cell is its time, or what else the rows tell, and how many times ours that is."""
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    if unit := rows[0].get("unit"):
        lines = [f"| {' | '.join(['case', unit, *(f'{name}, {unit}' for name in peers)])} |"]
        lines.append(f"| --- |{' ---: |' * (1 + len(peers))}")
        for row in rows:
            lines.append(f"| {' | '.join([row['case'], figure(row['value']), *peer_cells(row, peers)])} |")
        return lines
    columns = (
        "tokens/s",
        "read GB/s",
        "% of read",
        "bitkernels, MB",
        "F.linear, MB",
        "mamba_ssm, MB",
        "mamba_ssm bf16, MB",
        "simulation, MB",
        "resident, MB",
        "with torch alone, MB",
        "allocated, MB",
    )
    extra = [key for key in columns if any(key in row for row in rows)]
    header = ["case", "us", "p20-p80", "GB/s", "TFLOP/s", *extra, *(f"{name}, us" for name in peers)]
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    for row in rows:
        cells = [
            row["case"],
            figure(row["us"]),
            f"{figure(row['p20'])}-{figure(row['p80'])}",
            figure(row["GB/s"]),
            figure(row["TFLOP/s"]),
            *(figure(row[key]) if key in row else "" for key in extra),
            *peer_cells(row, peers),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def source(op: dict) -> str:
    driver = f", driver {op['driver']}" if op["driver"] else ""
    commit = op["commit"][:12] + (" with local changes" if op["dirty"] else "")
    peers = "".join(f", {name} {version}" for name, version in op["peers"].items() if version)
    triton = f", Triton {op['triton']}" if op["triton"] else ""
    return f"torch {op['torch']}{triton}{driver}{peers}; commit {commit}, {op['date'][:10]}"


def load() -> list[dict]:
    """GPUs first."""
    sources = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    found = [json.loads(p.read_text()) | {"stem": p.stem} for p in sources]
    return sorted(found, key=lambda content: content["device"] != "cuda")


def summary(machines: list[dict]) -> str:
    """The headline rows: ours, and each peer measured in the same run."""
    lines = ["| machine | op | case | us | against | at commit |", "| --- | --- | --- | ---: | --- | --- |"]
    for machine in machines:
        for op, content in machine["ops"].items():
            for row in content["rows"]:
                if not row["headline"]:
                    continue
                against = [
                    f"{figure(peer['speedup'])}x {name} ({figure(peer['us'])} us)"
                    for name, peer in row["peers"].items()
                    if "absent" not in peer
                ]
                commit = content["commit"][:7]
                cells = [machine["machine"], f"`{op}`", row["case"], figure(row["us"]), ", ".join(against), commit]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def everything(machines: list[dict]) -> str:
    lines = []
    for machine in machines:
        lines += [f"## {machine['machine']}", ""]
        for op, content in machine["ops"].items():
            lines += [f"### {op}", "", f"{source(content)}.", "", *table(content["rows"]), ""]
            curve = f"{op}_{machine['stem']}.png"
            if (ROOT / "docs" / curve).is_file():
                lines += [f"![{op}: time over size]({curve})", ""]
            absent = {n: p["absent"] for r in content["rows"] for n, p in r["peers"].items() if "absent" in p}
            lines += [f"- {name}: {reason}." for name, reason in absent.items()] + [""] * bool(absent)
    return "\n".join(lines).rstrip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page differs")
    check = parser.parse_args(arguments).check
    machines = load()
    stale = []
    for page, body in (
        (ROOT / "README.md", summary(machines)),
        (ROOT / "docs" / "benchmarks.md", everything(machines)),
    ):
        text = page.read_text()
        if text.count(BEGIN) != 1 or text.count(END) != 1:
            raise SystemExit(f"{page}: must hold {BEGIN} and {END} once each")
        head, rest = text.split(BEGIN)
        new = f"{head}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}" if machines else text
        if new != text:
            stale.append(page)
            if not check:
                page.write_text(new)
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'differs from benchmarks/results' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
