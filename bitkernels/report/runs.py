"""Runs on disk: a trained checkpoint, and beside it the metrics of its training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitkernels.checkpoint import Checkpoint, CheckpointError, load_checkpoint, read_metadata
from bitkernels.models import BiMambaConfig


@dataclass(frozen=True)
class Run:
    name: str
    file: Path
    config: BiMambaConfig
    training: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def recipe(self) -> str:
        return self.training.get("recipe", "unknown")

    @property
    def tokens(self) -> int | None:
        """Tokens that it was trained on."""
        if "steps" not in self.training:
            return None
        return self.training["steps"] * self.training["tokens_per_step"]

    @property
    def start_tokens(self) -> int:
        """Tokens that the weights it started from had been trained on."""
        return self.training.get("start_tokens", 0)

    def curve(self, value: str) -> tuple[list[int], list[float]]:
        """(tokens, values) of a metric, where it was reported."""
        lines = [line for line in self.metrics if value in line]
        per_step = self.training.get("tokens_per_step", 1)
        return [int(line["step"]) * per_step for line in lines], [line[value] for line in lines]

    def load(self, device="cpu") -> Checkpoint:
        return load_checkpoint(self.file, device)


def read_run(path: Path) -> Run:
    """The run at ``path``: a latent checkpoint, or a folder that holds one; ``metrics.jsonl`` beside it is optional.

    Raises ValueError where there is no latent checkpoint, or more than one.
    """
    file = path
    if path.is_dir():
        found = [file for file in sorted(path.glob("*.safetensors")) if read_metadata(file)["kind"] == "latent"]
        if len(found) != 1:
            raise ValueError(
                f"{path}: a run's folder must hold one trained checkpoint that is not packed, got {len(found)}"
            )
        file = found[0]
    metadata = read_metadata(file)
    if metadata["kind"] != "latent":
        raise ValueError(f"{file}: is packed; a report needs the trained checkpoint")
    try:
        config = BiMambaConfig.from_dict(metadata["config"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    metrics = file.parent / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    name = path.name if path.is_dir() else file.stem
    return Run(name, file, config, metadata["training"], [json.loads(line) for line in lines])
