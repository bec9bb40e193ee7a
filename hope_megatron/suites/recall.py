"""Copying and associative recall: what was written must be found again, word for word."""

from __future__ import annotations

import numpy as np

from hope_megatron.suites.splits import by_content
from hope_megatron.suites.task import IGNORE, Batch, Task, pad_batch

SEPARATOR = 1
COPY_SYMBOLS = range(2, 18)
KEYS = range(1, 65)
VALUES = range(65, 129)


def draw_copying(bin_name: str, size: int, rng: np.random.Generator) -> Batch:
    """n random symbols and a separator; then the same symbols in the same order. Bin "4-16": n."""
    low, high = (int(text) for text in bin_name.split("-"))
    rows = []
    for n in rng.integers(low, high + 1, size):
        symbols = rng.integers(COPY_SYMBOLS.start, COPY_SYMBOLS.stop, n).tolist()
        rows.append(([*symbols, SEPARATOR, *symbols[:-1]], [IGNORE] * n + symbols))
    return pad_batch(rows)


def draw_recall(bin_name: str, size: int, rng: np.random.Generator) -> Batch:
    """Key-value pairs, then every key again in another order: what was its value? Bin "8 pairs"."""
    pairs = int(bin_name.split()[0])
    tokens, targets = np.empty((size, 4 * pairs), np.int64), np.full((size, 4 * pairs), IGNORE)
    for row, target in zip(tokens, targets):
        keys = rng.choice(KEYS, pairs, replace=False)
        values, order = rng.choice(VALUES, pairs), rng.permutation(pairs)
        row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2] = keys, values
        row[2 * pairs :: 2], row[2 * pairs + 1 :: 2] = keys[order], values[order]
        target[2 * pairs :: 2] = values[order]
    return Batch(tokens, targets)


def recall_tasks(longest: int, pairs: int) -> list[Task]:
    """Both, begun small, each asked at the trained size and at twice that."""
    bins = (f"2-{longest}", f"{longest + 1}-{2 * longest}")
    lessons = tuple(f"2-{longest // part}" for part in (4, 2))
    source = by_content(draw_copying, (*lessons, bins[0]))
    copying = Task("copying", COPY_SYMBOLS.stop, bins, source, lessons=lessons)
    return [copying, associative_recall(pairs)]


def associative_recall(pairs: int) -> Task:
    """Begun with half of the pairs, asked at the trained number and at twice that."""
    bins, lessons = (f"{pairs} pairs", f"{2 * pairs} pairs"), (f"{pairs // 2} pairs",)
    source = by_content(draw_recall, (*lessons, bins[0]))
    return Task("associative recall", VALUES.stop, bins, source, lessons=lessons)
