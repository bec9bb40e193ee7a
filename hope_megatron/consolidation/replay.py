"""What is kept of a day: rows of tokens with answers of a teacher, in a buffer of bounded size.

T tokens of a row, D draws per token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Experience(NamedTuple):
    """A row that was read, and what a teacher answered."""

    inputs: np.ndarray
    """[T] int64."""
    targets: np.ndarray
    """[T] int64, the tokens that followed; -100 where none did."""
    draws: np.ndarray
    """[T, D] int32 tokens drawn from the teacher's distributions; -100 where nothing is asked."""
    surprise: float = 0.0
    before: float = 0.0
    """Nats per token of the model without a state."""
    adapted: float = 0.0
    """Nats per token of the model with the state that has just read the row."""


class ReplayBuffer:
    """The most surprising rows, and a uniform sample of the others, so that what is common is not forgotten.

    Args:
        capacity: rows that are kept at most.
        reservoir: share of them for the sample.
        by_surprise: False keeps a uniform sample of everything.
    """

    def __init__(self, capacity: int, *, reservoir: float = 0.25, by_surprise: bool = True, seed: int = 0) -> None:
        self._most = round(capacity * (1 - reservoir)) if by_surprise else 0
        self._sample_size = capacity - self._most
        self._rng = np.random.default_rng((seed, capacity))
        self._surprising: list[tuple[float, int, Experience]] = []
        self._sample: list[Experience] = []
        self._others = self._added = 0

    def add(self, experience: Experience) -> None:
        """Offer a row; it or another may have to go."""
        self._added += 1
        if self._most:
            self._surprising.append((experience.surprise, -self._added, experience))
            if len(self._surprising) <= self._most:
                return
            least = min(self._surprising, key=lambda kept: kept[:2])
            self._surprising.remove(least)
            experience = least[2]
        self._others += 1
        if len(self._sample) < self._sample_size:
            self._sample.append(experience)
        elif (place := int(self._rng.integers(self._others))) < self._sample_size:
            self._sample[place] = experience

    def kept(self) -> list[Experience]:
        """The rows, the surprising ones first in the order they came."""
        by_time = sorted(self._surprising, key=lambda kept: -kept[1])
        return [experience for _, _, experience in by_time] + self._sample


def rows_of(tokens: np.ndarray, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A stream [n + 1] cut into (inputs, targets), [length] int64 each; the last is filled up, and nothing asked of the filling."""
    rows = []
    for first in range(0, len(tokens) - 1, length):
        piece = tokens[first : first + length + 1]
        inputs, targets = np.zeros(length, np.int64), np.full(length, -100, np.int64)
        inputs[: len(piece) - 1], targets[: len(piece) - 1] = piece[:-1], piece[1:]
        rows.append((inputs, targets))
    return rows
