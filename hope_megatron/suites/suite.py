"""A suite: cells of task, subject, setting and seed. Tries come first, then what validation chose is trained and tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.fit import Weights
from hope_megatron.suites.scoring import Score
from hope_megatron.suites.selection import SELECTION_SEED

Scores = dict[str, float]

HOPES = ("hope", "hope_w1")
"""Families that `SuiteOptions.hope` is for."""


@dataclass(frozen=True)
class SuiteOptions:
    """What a user may change about a suite; None leaves the suite's own choice."""

    families: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    seeds: int = 5
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
    """One training, and its scores."""

    task: str
    subject: str
    """What is compared: a family, an ablation, a method."""
    seed: int
    setting: str = ""
    """Name of an entry of the suite's grid; "" where there is none."""

    @property
    def is_try(self) -> bool:
        """Whether it is for choosing a setting: validated, never tested."""
        return self.seed >= SELECTION_SEED

    def __str__(self) -> str:
        kind = "try" if self.is_try else f"seed {self.seed}"
        return ", ".join(part for part in (self.task, self.subject, self.setting, kind) if part)


@dataclass(frozen=True)
class Outcome:
    """What a cell gave."""

    validation: Mapping[Weights, Score] = field(default_factory=dict)
    scores: Mapping[Weights, Scores] = field(default_factory=dict)
    """Test scores by bin; empty for a try."""
    trajectory: Mapping[Weights, Mapping[str, list]] = field(default_factory=dict)
    """"steps", and the score of the next longer bin after each; empty for a try."""


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
    run: Callable[[Cell], Outcome]
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the settings that each subject tries, equally many for all; empty: there is nothing to choose."""
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
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Each subject's configuration in the first task; cells of a subject whose configuration changed are run again."""
    guessing: Callable[[str, str], float | None] = lambda task, column: None
    """Score by task and column of always giving the most frequent answer; None where that means nothing."""

    @property
    def num_tries(self) -> int:
        """Candidates per subject: settings, each with raw and with averaged weights; 1 where nothing is chosen."""
        return max((len(get_args(Weights)) * len(names) for names in self.grid.values()), default=1)

    def tries(self, subject: str) -> list[Cell]:
        """The cells that a choice of the subject's setting needs."""
        names = self.grid.get(subject, ())
        return [Cell(task, subject, SELECTION_SEED, name) for task in self.tasks for name in names]


def chosen(kind: str, wanted: tuple[str, ...] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The wanted names, or all of them.

    Raises:
        SuiteError: if one is unknown.
    """
    for name in wanted or ():
        if name not in known:
            raise SuiteError(f"no {kind} {name!r} in this suite; use some of: {', '.join(known)}")
    return wanted or known
