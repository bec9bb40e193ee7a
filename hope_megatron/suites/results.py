"""Finished cells, kept in one JSON file that is replaced after each: a cell a line, so that a record can be read and compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hope_megatron.runtime.files import write_text
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.models import same_model
from hope_megatron.suites.scoring import Score
from hope_megatron.suites.selection import Choice, choose
from hope_megatron.suites.suite import HOPES, Cell, Outcome, Suite

FORMAT = 2  # of the file; 1 had no validation


@dataclass
class Results:
    """Outcomes by cell, and what validation chose among them."""

    suite: Suite
    path: Path | None = None
    outcomes: dict[Cell, Outcome] = field(default_factory=dict)
    seconds: dict[Cell, float] = field(default_factory=dict)
    commits: dict[Cell, str] = field(default_factory=dict)
    """The commit that each was run with."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the user chose: enough to build the suite again."""
    others: dict[str, dict[str, Any]] = field(default_factory=lambda: {"parameters": {}, "models": {}})
    """What the files say of subjects that this suite leaves out; their cells stay in the record."""

    def choice(self, subject: str, task: str | None = None) -> Choice | None:
        """What validation chose for a subject over all tasks, or for one task alone; None while tries are missing."""
        if not self.suite.grid:
            return Choice("", "raw")
        cells = self.suite.tries(subject)
        if any(cell not in self.outcomes for cell in cells):
            return None
        tries = {(cell.task, cell.setting): self.outcomes[cell].validation for cell in cells}
        tasks = (task,) if task else self.suite.tasks
        return choose(tries, tasks, self.suite.less_is_better)

    def planned(self) -> Iterator[Cell]:
        """Every cell, as far as it is known: subject by subject its tries, then seed by seed what they chose.

        Ask again after each finished cell: the last try of a subject decides which cells follow it.
        """
        for subject in self.suite.subjects:
            yield from self.suite.tries(subject)
            if (headline := self.choice(subject)) is None:
                continue
            for seed in range(self.suite.seeds):
                for task in self.suite.tasks:
                    best = self.choice(subject, task)
                    settings = dict.fromkeys([headline.setting, best.setting if best else headline.setting])
                    yield from (Cell(task, subject, seed, name) for name in settings)

    def missing(self) -> Iterator[Cell]:
        """Planned cells that are not there yet."""
        return (cell for cell in self.planned() if cell not in self.outcomes)

    def to_follow(self) -> list[tuple[str, str]]:
        """Task and subject of the cells that will follow tries which are still missing, at least."""
        waiting = [subject for subject in self.suite.subjects if self.choice(subject) is None]
        return [(task, subject) for subject in waiting for task in self.suite.tasks] * self.suite.seeds

    def load(self, others: Iterable[Path] = ()) -> None:
        """Take up what the file has, if it is there, and what other files have.

        Cells of a subject whose configuration has changed since are left out. HOPE's own settings (--hope) may differ in the
        others: then their cells of HOPE are left out too.

        Raises:
            SuiteError: if one is of another suite or of other settings, or `others` cannot be read.
        """
        if self.path is not None and self.path.exists():
            self._take(self.path, "give another --json, or delete it")
        for other in others:
            self._take(other, "leave it out of --merge", any_hope=True)

    def save(self) -> None:
        """Replace the file."""
        if self.path is not None:
            write_text(self.path, self.as_json())

    def as_json(self) -> str:
        """The record: settings and origin, then a line per cell."""
        head = {
            "format": FORMAT,
            "suite": self.suite.name,
            "options": dict(self.options),
            "settings": plain(self.suite.settings),
            "quantity": self.suite.quantity,
            "parameters": {**self.others["parameters"], **self.suite.parameters},
            "models": {**self.others["models"], **{name: dict(model) for name, model in self.suite.models.items()}},
            "provenance": dict(self.provenance),
            "chosen": {
                subject: {task or "all tasks": str(self.choice(subject, task)) for task in (None, *self.suite.tasks)}
                for subject in self.suite.subjects
                if self.choice(subject) is not None and self.suite.grid
            },
        }
        rows = [self._row(cell, outcome) for cell, outcome in self.outcomes.items()]
        lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
        return json.dumps(head, indent=1, default=str)[:-2] + f',\n "cells": [\n{lines}\n]\n}}\n'

    def _row(self, cell: Cell, outcome: Outcome) -> dict[str, Any]:
        return {
            **cell._asdict(),
            "validation": {kind: [finite(x) for x in score] for kind, score in outcome.validation.items()},
            "scores": {kind: {k: finite(x) for k, x in found.items()} for kind, found in outcome.scores.items()},
            "trajectory": {
                kind: {name: [finite(x) for x in values] for name, values in path.items()}
                for kind, path in outcome.trajectory.items()
            },
            "seconds": self.seconds[cell],
            "commit": self.commits.get(cell, ""),
        }

    def _take(self, path: Path, mend: str, any_hope: bool = False) -> None:
        suite, ours = self.suite, plain(self.suite.settings)
        try:
            stored = read_record(path)
            theirs, found = stored["settings"], outcomes(stored)
            if any_hope and theirs.get("hope") != ours.get("hope"):
                theirs, ours = {**theirs, "hope": "any"}, {**ours, "hope": "any"}
                found = {cell: kept for cell, kept in found.items() if cell.subject.split(":")[0] not in HOPES}
            known = suite.models.keys() & stored["models"].keys()
            other = {name for name in known if not same_model(stored["models"][name], suite.models[name])}
            found = {cell: kept for cell, kept in found.items() if cell.subject not in other}
            same = stored["suite"] == suite.name and theirs == ours
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise SuiteError(f"{path} cannot be read as results of a suite ({error}); {mend}") from None
        if not same:
            raise SuiteError(
                f"{path} holds suite {stored['suite']} with settings {theirs}, not {suite.name} with {ours}; {mend}"
            )
        for kind, known in self.others.items():
            known.update(stored[kind])
        commits = {cell_of(row): row.get("commit", "") for row in stored["cells"]}
        for cell, (outcome, seconds) in found.items():
            if cell not in self.outcomes:
                self.outcomes[cell], self.seconds[cell], self.commits[cell] = outcome, seconds, commits[cell]


def read_record(path: Path) -> dict[str, Any]:
    """A record's JSON.

    Raises:
        SuiteError: if it cannot be read, or is of the format that had no validation.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SuiteError(f"{path} cannot be read as results of a suite ({error})") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise SuiteError(f"{path} cannot be read as results of a suite: expected format {FORMAT}; run the suite again")
    return stored


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell of a row."""
    return Cell(row["task"], row["subject"], row["seed"], row["setting"])


def outcomes(stored: Mapping[str, Any]) -> dict[Cell, tuple[Outcome, float]]:
    """A record's cells, each with its seconds."""

    def known(value: float | None) -> float:
        return float("nan") if value is None else value

    return {
        cell_of(row): (
            Outcome(
                {kind: Score(*map(known, score)) for kind, score in row["validation"].items()},
                {kind: {k: known(x) for k, x in found.items()} for kind, found in row["scores"].items()},
                {
                    kind: {name: [known(x) for x in values] for name, values in path.items()}
                    for kind, path in row["trajectory"].items()
                },
            ),
            row["seconds"],
        )
        for row in stored["cells"]
    }


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(dict(settings), default=str))


def finite(value: float) -> float | None:
    """A number that JSON can carry, rounded to nothing; None where it is not finite."""
    return value if value == value and abs(value) != float("inf") else None
