"""The chance level: what a bin scores when its most frequent answer is always given, whatever was read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hope_megatron.suites.task import IGNORE, Task

_SEQUENCES = 64
_KIND = 4  # of random numbers; training, validation, test and trajectory have 0 to 3


def guessing_score(task: Task, name: str) -> float:
    """By the task's metric; for the loss, nats of answers drawn by their frequencies.

    Args:
        name: one of the task's bins.
    """
    rng = np.random.default_rng((0, _KIND, task.bins.index(name)))
    return _score(task.source("test", 0)(name, _SEQUENCES, rng).targets, task.metric)


def guessing_of(tasks: Mapping[str, Task]) -> Callable[[str, str], float | None]:
    """`Suite.guessing` for tasks by name: None for columns that are no bins."""
    return lambda task, column: guessing_score(tasks[task], column) if column in tasks[task].bins else None


def _score(targets: np.ndarray, metric: str) -> float:
    """`targets` [B, T], IGNORE where nothing is asked."""
    answers, counts = np.unique(targets[targets != IGNORE], return_counts=True)
    shares = counts / counts.sum()
    if metric == "loss":
        return float(-(shares * np.log(shares)).sum())
    if metric == "answers":
        return float(shares.max())
    right = (targets == answers[counts.argmax()]) | (targets == IGNORE)
    return float(right.all(axis=1).mean())
