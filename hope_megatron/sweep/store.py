"""The sweep on disk: run files, claims and status of cells. Any number of runners may share it.

SWEEP/
  sweep.yaml        the sweep file, resolved
  cells/NAME.yaml   run file of a cell: `hope train` takes it
  cells/NAME.json   how its attempts went
  cells/NAME.lock   held by whoever runs it; the kernel gives it back when they die
  cells/NAME.log    output of its attempts
  runs/NAME/        run directory: metrics, checkpoints
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path

from hope_megatron.config.load import dump_config, read_mapping
from hope_megatron.runtime.files import write_json, write_text
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.plan import Cell, Plan
from launch.attempts import History, is_finished
from launch.submission import LaunchDirectory


class State(str, Enum):
    """Where a cell stands."""

    WAITING = "waiting"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """Stopped before its end, without a failure; it resumes."""
    FAILED = "failed"
    """Failed, and will be tried again."""
    SET_ASIDE = "set aside"
    """Failed too often; `hope sweep run --retry` tries again."""
    FINISHED = "finished"


@dataclass(frozen=True)
class Attempts:
    """What is recorded of a cell."""

    failures: int = 0
    reason: str = ""
    """Why the last attempt failed."""
    set_aside: bool = False
    started: bool = False


class SweepDirectory:
    """Paths and state of one sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells = path / "cells"
        self.runs = path / "runs"

    def run_file(self, cell: Cell) -> Path:
        """The cell's configuration."""
        return self.cells / f"{cell.name}.yaml"

    def log(self, cell: Cell) -> Path:
        """Output of the cell's attempts."""
        return self.cells / f"{cell.name}.log"

    def prepare(self, plan: Plan) -> None:
        """Write the sweep file and the cells' run files.

        Raises:
            SweepError: if a cell that has started was planned otherwise then, or the directory cannot be written.
        """
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            for cell in plan.cells:
                self._write_run_file(cell)
            write_text(self.path / "sweep.yaml", dump_config(plan.sweep))
        except OSError as error:
            raise SweepError(
                f"cannot write the sweep directory {self.path}: {error.strerror}; choose another output_dir"
            ) from None

    def _write_run_file(self, cell: Cell) -> None:
        path, text = self.run_file(cell), dump_config(cell.config)
        if path.exists():
            before = read_mapping(path)
            after = cell.config.model_dump(mode="json")
            changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
            if not changed:
                return
            if (self.runs / cell.name).exists():
                raise SweepError(
                    f"the cell {cell.name} has started with another configuration (its {', '.join(changed)} differ); "
                    f"give the changed sweep another name, or remove {self.path}"
                )
        write_text(path, text)

    def attempts(self, cell: Cell) -> Attempts:
        """What is recorded of a cell."""
        try:
            values = json.loads((self.cells / f"{cell.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return Attempts()
        known = {field.name for field in fields(Attempts)}
        return Attempts(**{key: value for key, value in values.items() if key in known})

    def record(self, cell: Cell, attempts: Attempts) -> None:
        """Record how a cell's attempts went."""
        write_json(self.cells / f"{cell.name}.json", asdict(attempts))

    def state(self, cell: Cell) -> State:
        """Where a cell stands, from what is on disk: its summary, its lock, its record, and the history of its Slurm job."""
        run_dir = self.runs / cell.name
        if is_finished(run_dir, cell.config.training.steps):
            return State.FINISHED
        if self._is_claimed(cell):
            return State.RUNNING
        attempts, history = self.attempts(cell), History(LaunchDirectory(run_dir).attempts)
        if history.given_up or attempts.set_aside:
            return State.SET_ASIDE
        if history.attempts and history.attempts[-1].ended is None:
            return State.RUNNING
        if attempts.failures:
            return State.FAILED
        return State.INTERRUPTED if attempts.started or history.attempts else State.WAITING

    def reason(self, cell: Cell) -> str:
        """Why a cell failed last; empty if it did not."""
        return History(LaunchDirectory(self.runs / cell.name).attempts).given_up or self.attempts(cell).reason

    def claim(self, cell: Cell) -> int | None:
        """Take a cell: a descriptor that holds it until closed, or None if someone else has it.

        The descriptor may be passed on to the training process: the claim then lasts as long as either lives.
        """
        descriptor = os.open(self.cells / f"{cell.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

    def _is_claimed(self, cell: Cell) -> bool:
        if not (self.cells / f"{cell.name}.lock").exists():
            return False
        descriptor = self.claim(cell)
        if descriptor is None:
            return True
        os.close(descriptor)
        return False
