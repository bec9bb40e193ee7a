"""State tracking: after every permutation, which one are all so far together (the word problem of S3 and S5)?

S5 is not solvable: a constant number of layers whose recurrence is diagonal cannot follow it at every length (arXiv 2404.08819).
"""

from __future__ import annotations

from itertools import permutations

import numpy as np

from hope_megatron.suites.splits import by_content
from hope_megatron.suites.task import IGNORE, Batch, Draw, Task, pad_batch

BEGIN = 1  # token before the first permutation; 0 pads


def elements(degree: int) -> np.ndarray:
    """All permutations of `degree` things, [degree!, degree], in lexical order; the identity is first."""
    return np.array(list(permutations(range(degree))))


def products(degree: int) -> np.ndarray:
    """The group's table [n, n]: the number of "first a, then b"."""
    every = elements(degree)
    number = {tuple(row): i for i, row in enumerate(every.tolist())}
    return np.array([[number[tuple(b[a])] for b in every] for a in every])


def _draw(degree: int) -> Draw:
    table = products(degree)
    count = len(table)

    def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
        low, high = (int(text) for text in name.split("-"))
        rows = []
        for length in rng.integers(low, high + 1, size):
            told, state, states = rng.integers(0, count, length).tolist(), 0, []
            for one in told:
                state = int(table[state, one])
                states.append(state)
            rows.append(([BEGIN, *(2 + t for t in told)], [IGNORE, *(2 + count + s for s in states)]))
        return pad_batch(rows)

    return draw


def permutation_tasks(longest: int) -> list[Task]:
    """S3 and S5, trained on products of up to `longest` permutations, asked there, up to twice and up to four times as many."""
    bins = (f"2-{longest}", f"{longest + 1}-{2 * longest}", f"{2 * longest + 1}-{4 * longest}")
    return [
        Task(f"S{degree}", 2 + 2 * len(elements(degree)), bins, by_content(_draw(degree), bins[:1]), "sequences")
        for degree in (3, 5)
    ]
