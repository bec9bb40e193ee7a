"""A task: batches of tokens and targets drawn by length, or by whatever its bins stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from hope_megatron.model import IGNORE

PAD = 0  # token behind the end of a shorter sequence


class Batch(NamedTuple):
    """What a model reads and what it is asked."""

    tokens: np.ndarray  # [B, T] int64
    targets: np.ndarray  # [B, T] int64, IGNORE where nothing is asked


Draw = Callable[[str, int, np.random.Generator], Batch]


@dataclass(frozen=True)
class Task:
    """Something to be learnt, and how it is asked."""

    name: str
    vocab_size: int
    """Token ids and answers share one vocabulary."""
    bins: tuple[str, ...]
    """What is asked of a trained model, one score each. Training ends with the first."""
    draw: Draw
    """(bin, sequences, random numbers) -> batch."""
    metric: Literal["sequences", "answers", "loss"] = "answers"
    """Share of sequences without a mistake, share of right answers, or nats per answer."""
    lessons: tuple[str, ...] = ()
    """Smaller bins that training begins with, one after the other."""
    known: float = 0.95
    """Score at which a lesson ends."""
    longest_lesson: float = 1 / 8
    """Share of the steps at which it ends anyway."""

    def train_batch(self, size: int, seed: int, step: int, name: str | None = None) -> Batch:
        """The batch of a training step: a function of seed and step. name: a lesson; None: the first bin."""
        return self.draw(name or self.bins[0], size, np.random.default_rng((seed, step)))

    def test_batch(self, name: str, size: int) -> Batch:
        """The sequences every model of this task is asked in a bin; other random numbers than any training step's."""
        number = (*self.bins, *self.lessons).index(name)
        return self.draw(name, size, np.random.default_rng((10**9, 7, number)))

    def guessing(self, name: str, size: int = 64) -> float:
        """Score of always giving the bin's most frequent answer, whatever was read (for the loss: of the answers' frequencies)."""
        targets = self.test_batch(name, size).targets
        answers, counts = np.unique(targets[targets != IGNORE], return_counts=True)
        shares = counts / counts.sum()
        if self.metric == "loss":
            return float(-(shares * np.log(shares)).sum())
        right = (targets == answers[counts.argmax()]) | (targets == IGNORE)
        return float(right.all(axis=1).mean() if self.metric == "sequences" else shares.max())


def pad_batch(rows: list[tuple[list[int], list[int]]]) -> Batch:
    """Tokens and targets of sequences of different length, side by side."""
    length = max(len(tokens) for tokens, _ in rows)
    batch = Batch(np.full((len(rows), length), PAD), np.full((len(rows), length), IGNORE))
    for i, (tokens, targets) in enumerate(rows):
        batch.tokens[i, : len(tokens)] = tokens
        batch.targets[i, : len(targets)] = targets
    return batch
