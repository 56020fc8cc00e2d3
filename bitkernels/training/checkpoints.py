"""Checkpoints of a run: all that a step depends on, so that a run goes on as if it had never stopped."""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils import _pytree as pytree

from bitkernels.checkpoint import atomic_file
from bitkernels.training.distributed import barrier, rank
from bitkernels.training.sign_gather import plain

_PREFIX = "step-"


class Checkpoints:
    """Checkpoints in ``folder``, one folder each, of which the last ``keep`` are kept.

    A checkpoint is written beside its place and renamed when all of it is on disk, so there are only whole ones,
    whenever a run is killed. Tensors are saved by shards (``torch.distributed.checkpoint``) and can be read by any
    number of processes. All processes of a run call every method.

    Args:
        folder: made where it does not exist.
        every: steps between checkpoints; the last step always leaves one.
        keep: how many are kept.
    """

    def __init__(self, folder: str | Path, every: int, keep: int = 2):
        if every < 1 or keep < 1:
            raise ValueError(f"Checkpoints: every and keep must be at least 1, got {every} and {keep}")
        self.folder, self.every, self.keep = Path(folder), every, keep

    def steps(self) -> list[int]:
        """The steps after which there is a checkpoint, in order."""
        found = self.folder.glob(f"{_PREFIX}*")
        return sorted(int(path.name.removeprefix(_PREFIX)) for path in found if path.is_dir())

    def due(self, done: int, last: int) -> bool:
        return done % self.every == 0 or done == last

    def save(self, done: int, run: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Saves the state after ``done`` steps; ``run`` is all else that decides the steps to come, as JSON has it."""
        place, temporary = self._place(done), self.folder / f".{_PREFIX}{done:08d}"
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
            temporary.mkdir(parents=True)
        barrier()
        with _quiet():
            dcp.save(_state(model, optimizer), checkpoint_id=temporary, no_dist=not dist.is_initialized())
        if rank() == 0:
            with atomic_file(temporary / "run.json") as path:
                path.write_text(json.dumps({"step": done, "run": run}))
            if place.is_dir():
                shutil.rmtree(place)
            os.rename(temporary, place)
            _sync(self.folder)
            for step in self.steps()[: -self.keep]:
                shutil.rmtree(self._place(step))
        barrier()

    def load(self, run: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Loads the latest checkpoint, if there is one, in place; returns after how many steps it was made, else 0.

        Raises:
            ValueError: it is of another ``run``.
        """
        steps = self.steps()
        if not steps:
            return 0
        place = self._place(steps[-1])
        saved, ours = json.loads((place / "run.json").read_text())["run"], json.loads(json.dumps(run))
        different = sorted(k for k in saved.keys() | ours.keys() if saved.get(k) != ours.get(k))
        if different:
            changes = ", ".join(f"{k} was {saved.get(k)!r} and is {ours.get(k)!r}" for k in different)
            raise ValueError(f"{place}: of another run: {changes}")
        state = _state(model, optimizer)
        with _quiet():
            dcp.load(state, checkpoint_id=place, no_dist=not dist.is_initialized())
        set_state_dict(model, optimizer, model_state_dict={}, optim_state_dict=state["optimizer"])
        return steps[-1]

    def _place(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One process saves and loads alone, and means to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Tensors that share memory with the model's, so that loading into them loads the model."""
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    return pytree.tree_map_only(Tensor, plain, state)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
