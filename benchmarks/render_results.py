"""Writes the tables of docs/results.md from docs/results.json, the report.json of `bitkernels report`.

python benchmarks/render_results.py            # write
python benchmarks/render_results.py --check    # exit 1 if the page differs from the results
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ROUNDED = "mamba-2 rounded"  # the run whose weights the post-training baselines are made of
EQUAL = 0.005  # two perplexities nearer than this are called equal

# Perplexities of Bi-Mamba 780M on Wiki2, PTB and C4 (its Tables 3, 5 and 9). Its baselines after training are other
# methods of as many bits as ours.
CORPORA = ("Wiki2", "PTB", "C4")
BI_MAMBA = {
    "mamba-2": (11.8, 20.0, 16.5),
    "bi-mamba": (13.4, 32.4, 14.5),
    "bi-mamba-in-proj": (13.8, 30.5, 14.4),
    "bi-mamba-kl": (15.0, 27.3, 15.6),
    "bi-mamba-next-token": (14.9, 30.9, 15.6),
    "sign": (1.8e4, 2.4e4, 1.5e4),
    "rtn-3": (152.5, 192.5, 186.0),
    "rtn-2": (1.6e8, 1.3e8, 7.3e7),
}
OTHERS = {"sign": "BiLLM", "rtn-3": "GPTQ, 3 bits", "rtn-2": "GPTQ, 2 bits"}
# Mean accuracy over seven tasks of Slender-Mamba 170M (its Table 2), which gives no perplexities.
SLENDER = {
    "mamba-2": 40.3,
    "slender-mamba-eq": 42.8,
    "slender-mamba-lq": 41.7,
    "slender-mamba": 40.6,
    "mamba-2-eq": 36.4,
    "mamba-2-lq": 34.7,
    "mamba-2-elq": 34.8,
}
# The papers' orderings: a statement, and the recipes of which it says that the first is the better one.
ORDERINGS = (
    ("1-bit training below 1 bit after training", "bi-mamba", "sign"),
    ("1-bit training below 2 bits after training", "bi-mamba", "rtn-2"),
    ("1-bit training below 3 bits after training", "bi-mamba", "rtn-3"),
    ("distillation below none", "bi-mamba", "bi-mamba-next-token"),
    ("distillation by cross-entropy below KL", "bi-mamba", "bi-mamba-kl"),
    ("in_proj alone below both projections", "bi-mamba-in-proj", "bi-mamba"),
    ("full precision below 1 bit", "mamba-2", "bi-mamba"),
    ("ternary training below rounding: embedding", "slender-mamba-eq", "mamba-2-eq"),
    ("ternary training below rounding: linears and head", "slender-mamba-lq", "mamba-2-lq"),
    ("ternary training below rounding: all", "slender-mamba", "mamba-2-elq"),
    ("linears and head below all ternary", "slender-mamba-lq", "slender-mamba"),
    ("embedding below linears and head ternary", "slender-mamba-eq", "slender-mamba-lq"),
)


def figure(value: float) -> str:
    return f"{value:.2e}" if value >= 1e5 else f"{value:,.0f}" if value >= 1e3 else f"{value:.2f}"


def lines(headings: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)]


def results(rows: list[dict], texts: list[str]) -> list[str]:
    headings = ["recipe", "run", "seed", "tokens before", "tokens", "parameter-bits", "packed, MB"]
    headings += [f"{text}: {score}" for text in texts for score in ("perplexity", "bits per byte", "per word")]
    cells = []
    for row in rows:
        size = row["file_bytes"]
        scores = [
            cell
            for text in texts
            for one in [row["results"][text]]
            for cell in (figure(one["perplexity"]), f"{one['bits_per_byte']:.3f}", figure(one["word_perplexity"]))
        ]
        cells.append([
            f"`{row['recipe']}`", row["run"], str(row["training"]["seed"]), f"{row['start_tokens']:,}",
            f"{row['tokens']:,}", f"{row['parameter_bits']:.3g}", "" if size is None else f"{size / 1e6:.2f}", *scores,
        ])  # fmt: skip
    return lines(headings, cells)


def verdict(better: float, worse: float) -> str:
    """Whether ``better`` is the smaller one, and how many times."""
    ratio = worse / better
    word = "equal" if abs(ratio - 1) < EQUAL else "yes" if ratio > 1 else "no"
    return f"{word} ({figure(ratio)}x)"


def paper(better: str, worse: str) -> str:
    """What the papers' own figures say."""
    if better in BI_MAMBA and worse in BI_MAMBA:
        pairs = zip(CORPORA, BI_MAMBA[better], BI_MAMBA[worse], strict=True)
        return ", ".join(f"{name} {'yes' if a < b else 'no'} ({a:,g} / {b:,g})" for name, a, b in pairs)
    a, b = SLENDER[better], SLENDER[worse]
    return f"accuracy {'yes' if a > b else 'no'} ({a:g} / {b:g})"


def orderings(rows: list[dict], texts: list[str]) -> list[str]:
    """Each of the papers' orderings, by the papers' figures and by ours."""
    named = {row["recipe"]: row["results"] for row in rows if row["run"] in (row["recipe"], ROUNDED)}
    cells = []
    for statement, better, worse in ORDERINGS:
        if better in named and worse in named:
            ours = [verdict(named[better][text]["perplexity"], named[worse][text]["perplexity"]) for text in texts]
            cells.append([statement, paper(better, worse), *ours])
    return lines(["ordering", "the papers", *texts], cells)


def published() -> list[str]:
    bi_mamba = [
        [OTHERS.get(name, f"`{name}`"), *(f"{value:g}" for value in values)] for name, values in BI_MAMBA.items()
    ]
    slender = [[f"`{name}`", f"{value:g}"] for name, value in SLENDER.items()]
    return [
        *lines(["Bi-Mamba 780M, perplexity", *CORPORA], bi_mamba),
        "",
        *lines(["Slender-Mamba 170M", "mean accuracy"], slender),
    ]


def body(content: dict) -> str:
    rows = content["rows"]
    texts = list(rows[0]["results"])
    return "\n".join([
        f"{content['machine']}, torch {content['torch']}; windows of {content['length']} tokens.", "",
        "## Results", "", *results(rows, texts),
        "", "## Which of the papers' orderings hold", "", *orderings(rows, texts),
        "", "## The papers' own figures", "", *published(),
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page differs")
    check = parser.parse_args(arguments).check
    page, source = ROOT / "docs" / "results.md", ROOT / "docs" / "results.json"
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page}: must hold {BEGIN} and {END} once each")
    shown = body(json.loads(source.read_text())) if source.is_file() else "Not measured yet."
    new = f"{text.split(BEGIN)[0]}{BEGIN}\n{shown}\n{END}{text.split(END)[1]}"
    if new == text:
        return 0
    print(f"{page.relative_to(ROOT)}: {'differs from docs/results.json' if check else 'written'}")
    if not check:
        page.write_text(new)
    return int(check)


if __name__ == "__main__":
    sys.exit(main())
