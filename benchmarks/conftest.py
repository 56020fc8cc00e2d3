import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import harness
import pytest
import results
import torch

import bitkernels  # noqa: F401

_rows: dict[str, list[dict]] = {}
_failed: set[str] = set()


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], help="what to time on (default: a GPU where there is one)")
    # A peer that tunes itself at the first call of a shape may take minutes for it.
    parser.addoption("--peer-cases", default="", help="time such peers only where the case's name contains this")


@pytest.fixture(scope="session")
def device(request):
    return harness.device_of(request.config)


@pytest.fixture(scope="session")
def peer_cases(request):
    return request.config.getoption("--peer-cases")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def record(request):
    """Keeps a row under the name of the benchmark's file."""
    return lambda row: _rows.setdefault(_operator(request.node), []).append(row)


@pytest.fixture
def compare(benchmark, device, record):
    """Times ours against its peers and keeps the row under the name of the benchmark's file."""

    def run(
        name: str, ours, peers, flops: float, headline: bool = False, weight_bytes: int = 0, rounds: int | None = None,
        **columns,
    ):  # fmt: skip
        timed = harness.compare(benchmark, device, ours, peers, flops, weight_bytes, rounds)
        row = {"case": name, **columns, **timed, "headline": headline}
        benchmark.extra_info.update(row)
        record(row)
        return row

    return run


def _operator(node) -> str:
    return Path(node.path).stem.removeprefix("bench_")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    if (yield).get_result().failed:
        _failed.add(_operator(item))


def pytest_sessionfinish(session, exitstatus):
    # The results of an operator are replaced as a whole, so it is all of its rows or none.
    for op in _failed & _rows.keys():
        del _rows[op]
    if _rows:
        print(f"\nresults: {results.save(harness.device_of(session.config), _rows)}")
