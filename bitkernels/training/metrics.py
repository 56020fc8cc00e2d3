"""Metrics of a run: JSON lines, and TensorBoard where it is installed."""

import importlib.util
import json
from pathlib import Path

from bitkernels.checkpoint import atomic_file


class Metrics:
    """Appends a line of JSON for each report to ``metrics.jsonl`` in ``folder``, and TensorBoard's events beside it.

    Args:
        folder: made where it does not exist.
        done: steps that were done before. Later lines, of a run that was killed after its last checkpoint, are taken
            back, so that the file tells of every step once.
    """

    def __init__(self, folder: str | Path, done: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _before(line, done)]
            with atomic_file(path) as temporary:
                temporary.write_text("".join(kept))
        self._file = open(path, "a")  # noqa: SIM115 (closed by close)
        self._writer = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder, purge_step=done + 1)

    def report(self, step: int, **values: float) -> None:
        """``values`` after ``step`` steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _before(line: str, done: int) -> bool:
    """Whether a line is whole and of one of the first ``done`` steps."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= done
    except (ValueError, KeyError):
        return False
