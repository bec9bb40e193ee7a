"""A task: batches of tokens and targets, drawn from three disjoint splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from hope_megatron.model import IGNORE

PAD = 0  # token behind the end of a shorter sequence

Split = Literal["training", "validation", "test"]
SPLITS: tuple[Split, ...] = ("training", "validation", "test")


class Batch(NamedTuple):
    """What a model reads and what it is asked."""

    tokens: np.ndarray  # [B, T] int64
    targets: np.ndarray  # [B, T] int64, IGNORE where nothing is asked


Draw = Callable[[str, int, np.random.Generator], Batch]
"""(bin, sequences, random numbers) -> batch; fewer sequences than asked for where there are no more."""
Source = Callable[[Split, int], Draw]
"""(split, seed) -> how that split is drawn. The seed decides which sequences belong to which split."""


@dataclass(frozen=True)
class Task:
    """Something to be learnt, and how it is asked."""

    name: str
    vocab_size: int
    """Token ids and answers share one vocabulary."""
    bins: tuple[str, ...]
    """What is asked of a trained model, one score each. The first is trained, the others are beyond it."""
    source: Source
    """No sequence of one split may occur in another."""
    metric: Literal["sequences", "answers", "loss"] = "answers"
    """Share of sequences without a mistake, share of right answers, or nats per answer."""
    lessons: tuple[str, ...] = ()
    """Smaller bins that training begins with, one after the other."""
    known: float = 0.95
    """Validation score at which a lesson ends."""
    longest_lesson: float = 1 / 8
    """Share of the steps at which it ends anyway."""

    @property
    def trained(self) -> tuple[str, ...]:
        """The bins that training and validation draw from."""
        return (*self.lessons, self.bins[0])


def pad_batch(rows: list[tuple[list[int], list[int]]]) -> Batch:
    """Tokens and targets of sequences of different length, side by side."""
    length = max(len(tokens) for tokens, _ in rows)
    batch = Batch(np.full((len(rows), length), PAD), np.full((len(rows), length), IGNORE))
    for i, (tokens, targets) in enumerate(rows):
        batch.tokens[i, : len(tokens)] = tokens
        batch.targets[i, : len(targets)] = targets
    return batch
