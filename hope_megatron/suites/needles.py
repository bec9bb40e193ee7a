"""Needles in a haystack of filler tokens: small models trained at one length, asked at longer ones."""

from __future__ import annotations

from typing import Literal

import numpy as np

from hope_megatron.suites.task import IGNORE, Batch, Task

MARK, ASK = 1, 2
FILLER = range(3, 35)
KEYS = range(35, 67)
VALUES = range(67, 131)
NUM_NEEDLES = 4
_SHORTEST = 32  # tokens that hold four needles, the questions about them, and some filler
Kind = Literal["single", "multi-key", "multi-query", "multi-value"]
KINDS: tuple[Kind, ...] = ("single", "multi-key", "multi-query", "multi-value")


def needle_tasks(lengths: tuple[int, ...]) -> list[Task]:
    """A task per kind, trained at the first length, begun at a quarter of it.

    A needle is a mark, a key and a value, at a random depth among filler tokens. "single": one needle. "multi-key": four, one
    is asked. "multi-query": four, all are asked. "multi-value": four with one key, whose values are asked in order.
    """

    def task(kind: Kind) -> Task:
        def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
            rows = [_sequence(kind, int(name.split()[0].replace(",", "")), rng) for _ in range(size)]
            return Batch(*(np.stack(part) for part in zip(*rows)))

        bins = tuple(f"{n:,} tokens" for n in lengths)
        lessons = tuple(f"{lengths[0] // part:,} tokens" for part in (4, 2) if lengths[0] // part >= _SHORTEST)
        return Task(kind, VALUES.stop, bins, draw, "sequences", lessons)

    return [task(kind) for kind in KINDS]


def _sequence(kind: Kind, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets [length]."""
    count = 1 if kind == "single" else NUM_NEEDLES
    keys = np.repeat(rng.choice(KEYS, 1), count) if kind == "multi-value" else rng.choice(KEYS, count, replace=False)
    values = rng.choice(VALUES, count)
    question, answers = _question(kind, keys, values, rng)
    filler = rng.integers(FILLER.start, FILLER.stop, length - len(question) - 3 * count)
    tokens = list(filler)
    places = np.sort(rng.integers(0, len(filler) + 1, count))
    for place, key, value in reversed(list(zip(places, keys, values))):
        tokens[place:place] = [MARK, key, value]
    targets = [IGNORE] * len(tokens) + answers
    return np.array([*tokens, *question], np.int64), np.array(targets, np.int64)


def _question(kind: Kind, keys: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> tuple[list, list]:
    """What stands at the end, and what is asked at each of its tokens."""
    if kind == "multi-value":
        return [ASK, keys[0], *values[:-1]], [IGNORE, *values]
    order = rng.permutation(len(keys))[: 1 if kind == "multi-key" else None]
    question = [token for i in order for token in (ASK, keys[i], values[i])]
    return question[:-1], [target for i in order for target in (IGNORE, values[i], IGNORE)][:-1]
