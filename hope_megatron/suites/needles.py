"""Needles in a haystack of filler tokens: small models trained at one length, asked at longer ones."""

from __future__ import annotations

from typing import Literal

import numpy as np

from hope_megatron.suites.splits import by_content
from hope_megatron.suites.task import IGNORE, Batch, Task

MARK, ASK = 1, 2
FILLER = range(3, 35)
KEYS = range(35, 67)
VALUES = range(67, 131)
_SHORTEST = 32  # tokens that hold four needles, the questions about them, and some filler
Kind = Literal["single", "multi-key", "multi-query", "multi-value", "last value", "two facts"]
KINDS: tuple[Kind, ...] = ("single", "multi-key", "multi-query", "multi-value", "last value", "two facts")
Pairs = list[tuple[int, int]]


def needle_tasks(lengths: tuple[int, ...]) -> list[Task]:
    """A task per kind, trained at the first length, begun at a quarter of it.

    A needle is a mark, a key and a value, at a random depth among filler tokens.

    - "single": one needle;
    - "multi-key": four, one is asked;
    - "multi-query": four, all are asked;
    - "multi-value": four with one key, whose values are asked in order;
    - "last value": two keys, twice each; the later value of one is asked (as in bAbI's first task: where is she now?);
    - "two facts": two needles whose value is the key of another; the value of that is asked (as in bAbI's second: she
      has it, where is she?).
    """

    def task(kind: Kind) -> Task:
        def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
            rows = [_sequence(kind, int(name.split()[0].replace(",", "")), rng) for _ in range(size)]
            return Batch(*(np.stack(part) for part in zip(*rows)))

        bins = tuple(f"{n:,} tokens" for n in lengths)
        lessons = tuple(f"{lengths[0] // part:,} tokens" for part in (4, 2) if lengths[0] // part >= _SHORTEST)
        return Task(kind, VALUES.stop, bins, by_content(draw, (*lessons, bins[0])), "sequences", lessons)

    return [task(kind) for kind in KINDS]


def _sequence(kind: Kind, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets [length]."""
    needles, question, answers = _needles(kind, rng)
    filler = rng.integers(FILLER.start, FILLER.stop, length - len(question) - 3 * len(needles))
    tokens = list(filler)
    places = np.sort(rng.integers(0, len(filler) + 1, len(needles)))
    for place, needle in reversed(list(zip(places, needles))):
        tokens[place:place] = [MARK, *needle]
    targets = [IGNORE] * len(tokens) + answers
    return np.array([*tokens, *question], np.int64), np.array(targets, np.int64)


def _needles(kind: Kind, rng: np.random.Generator) -> tuple[Pairs, list[int], list[int]]:
    """Keys and values in the order in which they stand; what stands at the end, and what is asked at each of its tokens."""
    keys, values = rng.choice(KEYS, 4, replace=False).tolist(), rng.choice(VALUES, 4).tolist()
    needles = list(zip(keys, values))
    if kind == "single":
        return needles[:1], *_question(needles[:1])
    if kind == "multi-key":
        return needles, *_question([needles[rng.integers(4)]])
    if kind == "multi-query":
        return needles, *_question([needles[i] for i in rng.permutation(4)])
    if kind == "multi-value":
        return [(keys[0], value) for value in values], [ASK, keys[0], *values[:-1]], [IGNORE, *values]
    if kind == "last value":
        needles = [(keys[i % 2], value) for i, value in zip(rng.permutation(4), values)]
        return needles, *_question([(keys[0], dict(needles)[keys[0]])])
    needles = [(keys[0], keys[1]), (keys[1], values[0]), (keys[2], keys[3]), (keys[3], values[1])]
    return [needles[i] for i in rng.permutation(4)], *_question([(keys[0], values[0])])


def _question(asked: Pairs) -> tuple[list[int], list[int]]:
    """Mark, key and value of each, but for the last value; each value is asked at its key."""
    tokens = [token for key, value in asked for token in (ASK, key, value)]
    targets = [target for _, value in asked for target in (IGNORE, value, IGNORE)]
    return tokens[:-1], targets[:-1]
