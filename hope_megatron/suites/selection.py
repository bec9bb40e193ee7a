"""The settings every family tries, and the rule by which validation data chooses among them.

Every subject of a suite has the same number of tries. Each is trained once per task on seeds that are not reported, and
scored on validation data at the trained lengths. The choice is the highest mean validation score over the tasks; ties
go to the lowest mean loss. No test figure enters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from statistics import fmean
from typing import NamedTuple, get_args

from hope_megatron.suites.fit import Weights
from hope_megatron.suites.scoring import Score

SELECTION_SEED = 1000
"""Seed of the tries; reported seeds count from 0."""


class Setting(NamedTuple):
    """One entry of a grid."""

    name: str
    optimizer: str
    lr: float
    start: str = "own"
    """Which initial settings of the memories: see `families.starts`."""


class Choice(NamedTuple):
    """A setting and which of its weights, as validation chose them."""

    setting: str
    weights: Weights

    def __str__(self) -> str:
        return f"{self.setting}, {self.weights} weights" if self.setting else f"{self.weights} weights"


Validation = Mapping[Weights, Score]


def choose(
    tries: Mapping[tuple[str, str], Validation], tasks: Iterable[str], less_is_better: Collection[str] = ()
) -> Choice:
    """The best setting and kind of weights for some tasks.

    Args:
        tries: validation of each (task, setting).
        tasks: over which the mean is taken; the tries of every setting must be there.
        less_is_better: tasks whose scores are losses.
    """
    tasks = tuple(tasks)
    candidates = [Choice(name, kind) for name in dict.fromkeys(s for _, s in tries) for kind in get_args(Weights)]

    def rank(choice: Choice) -> tuple[float, float]:
        found = {task: tries[task, choice.setting][choice.weights] for task in tasks}
        value = fmean(-score.value if task in less_is_better else score.value for task, score in found.items())
        ranks = value, -fmean(score.nats for score in found.values())
        return ranks if all(map(math.isfinite, ranks)) else (-math.inf, -math.inf)  # diverged

    return max(candidates, key=rank)


def num_tries(grid: Iterable[Setting]) -> int:
    """Candidates that validation chooses from: every setting, with raw and with averaged weights."""
    return len(get_args(Weights)) * len(tuple(grid))
