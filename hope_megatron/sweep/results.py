"""What finished cells measured, in one file that can be committed: another machine goes on where this one stopped.

The file holds, for each finished cell, its training curve and last held-out losses, with the commit and the seconds it took. It
does not hold checkpoints. `place` makes cells of a sweep finished that the file has, `gather` adds those that have finished since.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline import Manifest
from hope_megatron.runtime.files import write_json, write_text
from hope_megatron.runtime.records import read_object, seal
from hope_megatron.sweep.collect import last_kinds
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.plan import Cell, Plan
from hope_megatron.sweep.store import State, SweepDirectory
from hope_megatron.training.metrics import METRICS_FILE, read_metrics

FORMAT = "hope-sweep-results-v1"
POINTS = 60
"""Points of a training curve that are kept."""
_FREE = {
    "output_dir",
    "data",
    "tracking",
    "checkpoint",
    "retries",
    "budget",
    "hardware",
    "fit",
    "sizes",
    "design",
    "axes",
    "seeds",
}
"""Keys of a sweep that may differ: where things lie, what it may cost, and which cells there are."""


@dataclass(frozen=True)
class Corpus:
    """What tells two sets of training data apart, wherever they lie."""

    tokenizer_sha256: str
    train_documents: int
    train_tokens: int
    heldout_documents: int
    heldout_tokens: int

    @classmethod
    def of(cls, plan: Plan) -> Corpus:
        """The data of a sweep's cells.

        Raises:
            SweepError: if cells differ in their data, or have no held-out part.
        """
        paths = {(cell.config.data.train, cell.config.data.heldout) for cell in plan.cells}
        if len(paths) != 1:
            raise SweepError("--results: all cells must train on the same data")
        ((train_path, heldout_path),) = paths
        if train_path is None or heldout_path is None:
            raise SweepError("--results: the base run needs data.train and data.heldout")
        train, heldout = Manifest.load(train_path), Manifest.load(heldout_path)
        return cls(train.tokenizer_sha256, train.documents, train.tokens, heldout.documents, heldout.tokens)


class Results:
    """A file of results, of one sweep on one corpus."""

    def __init__(self, file: Path, plan: Plan, directory: SweepDirectory, *, to_run: bool = True) -> None:
        """Read the file, if it is there.

        Args:
            file: may be missing; `gather` writes it.
            plan: the cells.
            directory: where they are run.
            to_run: cells are to be added, so that the data must be here, and be that of the file. Otherwise its word is taken.

        Raises:
            SweepError: if it is not such a file, or is of another sweep or other data.
        """
        self.file, self.plan, self.directory = file, plan, directory
        self.sweep = _definition(plan)
        self.data = asdict(Corpus.of(plan)) if to_run or not file.exists() else None
        self.cells: dict[str, Any] = {}
        self._read()

    def _read(self) -> None:
        """Take over what the file has, which another machine may have added to."""
        if not self.file.exists():
            return
        values = read_object(self.file) or {}
        parts: list[Any] = [values.get(part) for part in ("sweep", "data", "cells")]
        good = all(isinstance(part, dict) for part in parts) and isinstance(parts[0].get("families"), dict)
        if values.get("format") != FORMAT or not good:
            raise SweepError(f"{self.file} holds no results of a sweep ({FORMAT}); give another file")
        sweep, data, cells = parts
        families = {**self.sweep["families"], **sweep["families"]}
        known = {name: families[name] for name in self.sweep["families"]}
        self._refuse_other("sweep", {**sweep, "families": known}, self.sweep)
        self._refuse_other("data", data, self.data or data)
        self.sweep, self.data, self.cells = {**self.sweep, "families": families}, data, {**cells, **self.cells}

    def _refuse_other(self, part: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if differing:
            raise SweepError(
                f"{self.file}: its cells were run with another {part} ({', '.join(differing)}); "
                "give another file, or the sweep another name"
            )

    @property
    def train_tokens(self) -> int:
        """Tokens in the training data."""
        assert self.data is not None
        return int(self.data["train_tokens"])

    def place(self) -> int:
        """Make the cells finished that the file has and this machine has not begun.

        Returns:
            How many these are.

        Raises:
            SweepError: if a cell of the file had another size or length.
        """
        placed = 0
        for cell in self.plan.cells:
            found = self.cells.get(cell.name)
            if found is None or self.directory.state(cell) is not State.WAITING:
                continue
            if _shape(cell) != {key: found.get(key) for key in _shape(cell)}:
                raise SweepError(
                    f"{self.file}: the cell {cell.name} was run as another model; give the sweep another name"
                )
            try:
                curve = [{"step": step, "train/loss": loss} for step, loss in found["curve"]]
                records = [
                    *curve,
                    {"step": found["steps"], "heldout/loss": found["heldout_loss"], **found.get("kinds", {})},
                ]
                summary = {"complete": True, "step": found["steps"], "placed_from": self.file.name, **found["run"]}
            except (KeyError, TypeError, ValueError) as error:
                raise SweepError(f"{self.file}: the cell {cell.name} is damaged ({error}); remove it there") from None
            run = self.directory.runs / cell.name
            write_text(run / METRICS_FILE, "".join(f"{seal(record)}\n" for record in records))
            write_json(run / "summary.json", summary)
            placed += 1
        return placed

    def gather(self) -> int:
        """Add what has finished here to what the file has by now, and write it.

        Returns:
            How many cells of the sweep it has now.
        """
        self._read()
        for cell in self.plan.cells:
            if cell.name not in self.cells and self.directory.state(cell) is State.FINISHED:
                self.cells[cell.name] = _result(cell, self.directory.runs / cell.name)
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(self.cells[name])}" for name in sorted(self.cells))
        head = {"format": FORMAT, "sweep": self.sweep, "data": self.data}
        write_text(self.file, f'{json.dumps(head, indent=1)[:-2]},\n "cells": {{\n{lines}\n }}\n}}\n')
        return sum(cell.name in self.cells for cell in self.plan.cells)


def _definition(plan: Plan) -> dict[str, Any]:
    """What all cells of a sweep share."""
    values = plan.sweep.model_dump(mode="json")
    values["base"] = {key: value for key, value in values["base"].items() if key not in _FREE}
    return {key: value for key, value in values.items() if key not in _FREE}


def _shape(cell: Cell) -> dict[str, Any]:
    return {"parameters": cell.num_parameters, "tokens": cell.tokens, "steps": cell.config.training.steps}


def _result(cell: Cell, run: Path) -> dict[str, Any]:
    records = read_metrics(run / METRICS_FILE)
    heldout = [record["heldout/loss"] for record in records if "heldout/loss" in record]
    if not heldout:
        raise SweepError(f"{run / METRICS_FILE} has no heldout/loss; give data.heldout in the base run")
    train = [(int(record["step"]), round(record["train/loss"], 5)) for record in records if "train/loss" in record]
    summary = read_object(run / "summary.json") or {}
    provenance = summary.get("provenance") or {}
    kept = {"wall_s": summary.get("wall_s"), "provenance": {"commit": provenance.get("commit")}}
    return {
        **_shape(cell),
        "heldout_loss": heldout[-1],
        "kinds": last_kinds(records),
        "run": kept,
        "curve": _thinned(train),
    }


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `POINTS` points, each the mean over those around it, so that less noise is left and none is picked."""
    size = -(-len(curve) // POINTS)
    groups = [curve[at : at + size] for at in range(0, len(curve), size)]
    return [(group[-1][0], round(sum(loss for _, loss in group) / len(group), 5)) for group in groups]
