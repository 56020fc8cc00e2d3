import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_show_the_recorded_figures():
    assert load("render").main(["--check"]) == 0
    assert load("render_results").main(["--check"]) == 0


def test_render_writes_and_check_notices(tmp_path, monkeypatch):
    render = load("render")
    monkeypatch.setattr(render, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for page in (tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"):
        page.write_text(f"before\n{render.BEGIN}\n{render.END}\nafter\n")
    times = {"us": 1234.5, "p20": 0.123, "p80": 10.06}
    peers = {"peer": {**times, "speedup": 2.0}, "missing": {"absent": "not installed"}}
    row = {"case": "a case", **times, "GB/s": 1.0, "TFLOP/s": 0.0, "headline": True, "peers": peers}
    op = dict.fromkeys(("driver", "triton"), "1") | {"torch": "2", "commit": "f" * 40, "dirty": True, "peers": {}}
    of_errors = [{"case": "y", "unit": "error", "value": 2e-3, "peers": {"peer": {"value": 3e-3, "ratio": 1.5}}}]
    op["date"] = "2030-01-01T00:00:00"
    ops = {"op": {**op, "rows": [row]}, "accuracy": {**op, "rows": [of_errors[0] | {"headline": False}]}}
    content = {"machine": "m", "device": "cpu", "ops": ops}
    (tmp_path / "benchmarks" / "results" / "m.json").write_text(json.dumps(content))

    (tmp_path / "docs" / "op_m.png").touch()

    assert render.main(["--check"]) == 1
    assert render.main([]) == 0
    assert render.main(["--check"]) == 0
    readme, page = (tmp_path / "README.md").read_text(), (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| m | `op` | a case | 1234 | 2x peer (1234 us) |" in readme
    assert "before" in readme
    assert "after" in readme
    assert "with local changes" in page
    assert "| absent |" in page
    assert "- missing: not installed." in page
    assert "![op: time over size](op_m.png)" in page
    assert "| case | error | peer, error |" in page
    assert "| y | 0.002 | 0.003 (1.5x) |" in page


def test_results_say_which_orderings_hold(tmp_path, monkeypatch):
    render = load("render_results")
    monkeypatch.setattr(render, "ROOT", tmp_path)
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text(f"before\n{render.BEGIN}\n{render.END}\nafter\n")
    assert render.main([]) == 0
    assert "Not measured yet." in page.read_text()

    def row(recipe, run, test, wiki):
        results = {
            name: {"perplexity": value, "tokens": 9, "bits_per_byte": 1.5, "word_perplexity": 123456.0}
            for name, value in (("test", test), ("wiki", wiki))
        }
        numbers = {"start_tokens": 5000, "tokens": 640, "parameter_bits": 3.21e8, "file_bytes": 6_800_000}
        return {"recipe": recipe, "run": run, "training": {"seed": 3}, "results": results, **numbers}

    rows = [
        row("mamba-2", "teacher", 1.0, 1.0),
        row("mamba-2", "mamba-2", 20.0, 80.0),
        row("bi-mamba", "bi-mamba", 25.0, 100.0),
        row("bi-mamba-next-token", "bi-mamba-next-token", 24.0, 120.0),
        row("bi-mamba-kl", "bi-mamba-kl", 25.01, 100.1),
        row("sign", "teacher rounded", 1.0, 1.0),
        row("sign", "mamba-2 rounded", 5000.0, 2.5e6),
        row("bi-mamba", "bi-mamba-22m", 10.0, 10.0),
    ]
    content = {"machine": "a GPU", "torch": "2", "length": 512, "rows": rows}
    (tmp_path / "docs" / "results.json").write_text(json.dumps(content))
    assert render.main(["--check"]) == 1
    assert render.main([]) == 0
    assert render.main(["--check"]) == 0
    shown = page.read_text()
    assert shown.startswith("before\n")
    assert shown.endswith("after\n")
    assert (
        "| `sign` | mamba-2 rounded | 3 | 5,000 | 640 | 3.21e+08 | 6.80 | 5,000 | 1.500 | 1.23e+05 | 2.50e+06" in shown
    )
    found = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[-2:] for line in shown.splitlines()}
    assert found["1-bit training below 1 bit after training"] == ["yes (200.00x)", "yes (25,000x) |"]
    assert found["distillation below none"] == ["no (0.96x)", "yes (1.20x) |"]
    assert found["distillation by cross-entropy below KL"] == ["equal (1.00x)", "equal (1.00x) |"]
    assert found["full precision below 1 bit"] == ["yes (1.25x)", "yes (1.25x) |"]
    assert "in_proj alone below both projections" not in found
    assert "PTB no (32.4 / 30.9)" in shown


def test_plot_draws_a_curve_where_one_was_measured(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    plot = load("plot")
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    peers = {"peer": {"us": 9.0}, "missing": {"absent": "not installed"}}

    def of(case, shape, **columns):
        return {"case": case, "shape": shape, "dtype": "torch.bfloat16", "peers": {}, **columns}

    rows = [of(f"a layer, M={M}", [M, 64, 64], us=5.0 + M, peers=peers) for M in range(1, 12)]
    short = [of("another, M=1", [1, 64, 64], us=5.0), of("a layer, M=1", [1, 64, 64], us=5.0, dtype="torch.float16")]
    read = [{"case": "memory read", "us": 1.0, "GB/s": 4000.0, "peers": {}}]
    ops = {"packed_linear": {"rows": [*rows, *short, *read]}}
    content = {"machine": "m", "device": "cuda", "ops": ops}
    (tmp_path / "benchmarks" / "results" / "m.json").write_text(json.dumps(content))
    assert list(plot.curves(content["ops"]["packed_linear"]["rows"])) == ["a layer"]
    assert plot.floor([1, 64, 64], 1000.0, 1e9) == pytest.approx((64 * 2 * 4 + 2 * 128 + 8 * 64) / 1000)
    assert plot.main() == [tmp_path / "docs" / "packed_linear_m.png"]
    assert plot.main()[0].stat().st_size > 1000

    rates = {"GB/s": 1000.0, "TFLOP/s": 100.0, "peers": peers}
    ops["ssd_scan"] = {
        "rows": [
            of(f"{name}, forward", [1, 2**n], us=float(2**n), **rates)
            for n in range(9, 15)
            for name in (f"2.7B, B=1, T={2**n}", f"2.7B, B=1, T={2**n}, G=8", f"780M, B=1, T={2**n}")
        ]
    }
    assert {name: len(points) for name, points in plot.lengths(ops["ssd_scan"]["rows"]).items()} == {"forward": 6}
    (tmp_path / "benchmarks" / "results" / "m.json").write_text(json.dumps(content))
    assert [path.name for path in plot.main()] == ["packed_linear_m.png", "ssd_scan_m.png"]


def test_bars_tell_what_misses_them(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bars = load("bars")
    monkeypatch.setattr(bars.plot, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)

    def recorded(factor, error):
        curve = [
            {"case": f"a layer, M={M}", "shape": [M, 64, 64], "dtype": "torch.bfloat16", "us": us,
             "peers": {"cuBLAS bf16": {"us": 10.0}}}
            for M, us in enumerate([1.0, 2.0, 3.0, 3.0 * factor, *[4.0] * 7], 1)
        ]  # fmt: skip
        accuracy = [{"case": "dx", "unit": "error", "value": error, "peers": {"mamba_ssm": {"value": 1e-3}}}]
        ops = {"packed_linear": {"rows": curve}, "ssd_scan_accuracy": {"rows": accuracy}}
        (tmp_path / "benchmarks" / "results" / "m.json").write_text(json.dumps({"ops": ops}))
        return bars.main("m")

    assert recorded(1.0, 1.05e-3) == 0
    assert "error" in capsys.readouterr().out
    assert recorded(1.5, float("nan")) == 1
    shown = capsys.readouterr().out
    assert "a layer, M=4: 4.5 above 4.4" in shown
    assert "dx: nan above 0.0011" in shown
    assert "ssd_scan_call: a forward call takes 60 us of CPU time: not measured" in shown


def test_results_are_replaced_an_operator_at_a_time(tmp_path, monkeypatch):
    results = load("results")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.save("cpu", {"a": [{"us": 1}], "b": [{"us": 2}]})
    path = results.save("cpu", {"b": [{"us": 3}]})
    ops = json.loads(path.read_text())["ops"]
    assert [ops[name]["rows"][0]["us"] for name in ("a", "b")] == [1, 3]
    assert ops["a"]["torch"]
    assert list(tmp_path.iterdir()) == [path]
