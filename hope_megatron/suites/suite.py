"""A suite: cells of task, subject and seed, each with scores; run one after the other, kept as they finish."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from hope_megatron.runtime.files import write_json
from hope_megatron.runtime.formatting import duration_text
from hope_megatron.suites.errors import SuiteError

Scores = dict[str, float]

HOPES = ("hope", "hope_w1")
"""Families that `SuiteOptions.hope` is for."""


@dataclass(frozen=True)
class SuiteOptions:
    """What a user may change about a suite; None leaves the suite's own choice."""

    families: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    seeds: int = 3
    steps: int | None = None
    lr: float | None = None
    optimizer: str | None = None
    chunk_tokens: int | None = None
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    hope: tuple[str, ...] = ()
    """Settings of the HOPES, `memory.eta_init=0.5`; other families keep theirs."""
    quick: bool = False
    lengths: tuple[int, ...] | None = None
    data: tuple[Path, ...] = ()


class Cell(NamedTuple):
    """One training and its scores."""

    task: str
    subject: str
    """What is compared: a family, an ablation, a method."""
    seed: int


@dataclass(frozen=True)
class Suite:
    """A table to fill."""

    name: str
    title: str
    tasks: tuple[str, ...]
    subjects: tuple[str, ...]
    seeds: int
    settings: Mapping[str, Any]
    """Everything that the scores depend on; cells of other settings are never mixed. `hope` is the HOPES' own."""
    run: Callable[[Cell], Scores]
    quantity: str = "share of answers that are right"
    less_is_better: tuple[str, ...] = ()
    """Tasks or columns in which it is, where more is better by default."""
    unbounded: tuple[str, ...] = ()
    """Tasks whose scores are not shares from 0 to 1."""
    subject_kind: str = "model"
    """What the rows of the tables are."""
    paper: str = ""
    """What the paper reports of this test."""
    notes: str = ""
    """How it was run here, and where that differs."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Parameters of each subject's model, in the first task."""
    guessing: Callable[[str, str], float | None] = lambda task, column: None
    """Score by task and column of always giving the most frequent answer; None where there is no such thing."""

    def cells(self) -> Iterator[Cell]:
        """Seed by seed, so that an interrupted suite has whole tables of the seeds it got to."""
        for seed in range(self.seeds):
            for task in self.tasks:
                for subject in self.subjects:
                    yield Cell(task, subject, seed)


@dataclass
class Results:
    """Finished cells, kept in a file that is replaced after each one."""

    suite: Suite
    path: Path | None = None
    scores: dict[Cell, Scores] = field(default_factory=dict)
    seconds: dict[Cell, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def load(self, others: Iterable[Path] = ()) -> None:
        """Take up what the file has, if it is there, and what other files have.

        HOPE's own settings may differ in the others: then their cells of HOPE are left out.

        Raises:
            SuiteError: if one is of another suite or of other settings, or `others` cannot be read.
        """
        if self.path is not None and self.path.exists():
            self._take(self.path, "give another --json, or delete it")
        for other in others:
            self._take(other, "leave it out of --merge", any_hope=True)

    def _take(self, path: Path, mend: str, any_hope: bool = False) -> None:
        suite, ours = self.suite, _plain(self.suite.settings)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            theirs, sizes = stored["settings"], stored["parameters"]
            found = {
                Cell(row["task"], row["subject"], row["seed"]): (row["scores"], row["seconds"])
                for row in stored["cells"]
            }
            if any_hope and theirs.get("hope") != ours.get("hope"):
                theirs, ours = {**theirs, "hope": "any"}, {**ours, "hope": "any"}
                found = {cell: kept for cell, kept in found.items() if cell.subject.split(":")[0] not in HOPES}
            same_sizes = all(suite.parameters[name] == sizes[name] for name in suite.parameters.keys() & sizes)
            same = stored["suite"] == suite.name and theirs == ours and same_sizes
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SuiteError(f"{path} cannot be read as results of a suite ({error}); {mend}") from None
        if not same:
            raise SuiteError(
                f"{path} holds suite {stored['suite']} with settings {theirs} and parameters {sizes}, not "
                f"{suite.name} with {ours} and {dict(suite.parameters)}; {mend}"
            )
        for cell, (scores, seconds) in found.items():
            self.scores.setdefault(cell, scores)
            self.seconds.setdefault(cell, seconds)

    def save(self) -> None:
        """Replace the file."""
        if self.path is not None:
            write_json(self.path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        cells = [
            {**cell._asdict(), "scores": scores, "seconds": self.seconds[cell]} for cell, scores in self.scores.items()
        ]
        return {
            "suite": self.suite.name,
            "settings": _plain(self.suite.settings),
            "quantity": self.suite.quantity,
            "parameters": dict(self.suite.parameters),
            "provenance": dict(self.provenance),
            "cells": cells,
        }


def run_suite(
    suite: Suite,
    path: Path | None,
    provenance: Mapping[str, Any],
    others: Iterable[Path] = (),
    tell: Callable[[str], None] = print,
) -> Results:
    """Run the cells that are not there yet.

    Args:
        path: where finished cells are kept; None keeps them in memory alone.
        provenance: commit, versions and machine, for the record.
        others: files of the same suite, from other machines, whose cells need not be run again.
        tell: gets a line for each finished cell, with about how long the rest will take.
    """
    results = Results(suite, path, provenance=provenance)
    results.load(others)
    cells = list(suite.cells())
    for number, cell in enumerate(cells, 1):
        if cell in results.scores:
            continue
        started = time.monotonic()
        results.scores[cell] = suite.run(cell)
        results.seconds[cell] = round(time.monotonic() - started, 1)
        results.save()
        shown = ", ".join(f"{name}: {value:.3g}" for name, value in results.scores[cell].items())
        took, left = duration_text(results.seconds[cell]), duration_text(_seconds_left(results, cells))
        tell(f"[{number}/{len(cells)}] {cell.task}, {cell.subject}, seed {cell.seed}: {shown} ({took}, {left} left)")
    return results


def _seconds_left(results: Results, cells: list[Cell]) -> float:
    """Each missing cell at the mean of its other seeds, else of all finished cells."""
    finished: dict[tuple[str, str] | None, list[float]] = {}
    for cell, seconds in results.seconds.items():
        for kind in (cell[:2], None):
            finished.setdefault(kind, []).append(seconds)
    missing = (cell for cell in cells if cell not in results.scores)
    return sum(fmean(finished.get(cell[:2], finished[None])) for cell in missing)


def chosen(kind: str, wanted: tuple[str, ...] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The wanted names, or all of them.

    Raises:
        SuiteError: if one is unknown.
    """
    for name in wanted or ():
        if name not in known:
            raise SuiteError(f"no {kind} {name!r} in this suite; use some of: {', '.join(known)}")
    return wanted or known


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(dict(settings), default=str))
