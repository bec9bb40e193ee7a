"""Which sequences are for training, which for validation, which for the test.

A task whose sequences are made by a generator is divided by content (`by_content`): a keyed digest of a sequence's tokens
decides its split, so that no sequence of one split can be drawn in another, however often it is asked. A task that has
only a few sequences, or is made of documents, deals those out (`dealt`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.task import IGNORE, PAD, Batch, Draw, Source, Split

HELD_OUT = 0.1  # share of sequences that are for validation, and as many for the test
_MOST_DRAWS = 1000  # batches drawn in vain before the space is taken to be too small
Item = TypeVar("Item")


def by_content(draw: Draw, trained: Sequence[str]) -> Source:
    """Divide what `draw` makes by a digest of each sequence.

    Args:
        draw: makes sequences of every bin.
        trained: bins that training draws from. Sequences of the other bins have other lengths, so they are all for the test.
    """

    def source(split: Split, seed: int) -> Draw:
        def of_split(name: str, size: int, rng: np.random.Generator) -> Batch:
            if name not in trained:
                if split != "test":
                    raise SuiteError(f"bin {name!r} is for the test alone; {split} draws from {', '.join(trained)}")
                return draw(name, size, rng)
            return _draw_until(draw, split, seed, name, size, rng)

        return of_split

    return source


def split_of(tokens: np.ndarray, seed: int) -> Split:
    """The split of a sequence [T], padding left out."""
    end = len(tokens) - int(np.argmax(tokens[::-1] != PAD)) if (tokens != PAD).any() else 0
    content = np.ascontiguousarray(tokens[:end], np.int64).tobytes()
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    share = int.from_bytes(digest, "little") / 2**64
    return "test" if share < HELD_OUT else "validation" if share < 2 * HELD_OUT else "training"


def dealt(
    items: Sequence[Item], split: Split, seed: int, *, share: float = HELD_OUT, keep_ends: bool = False
) -> list[Item]:
    """The items of a split, in their own order.

    Args:
        share: for validation, and as many for the test; at least one item.
        keep_ends: the first and the last item are always for training, so that what is held out lies between trained ones.

    Raises:
        SuiteError: if there are too few.
    """
    inner = range(1, len(items) - 1) if keep_ends else range(len(items))
    each = max(1, round(share * len(items)))
    if len(inner) < 2 * each + 1:
        raise SuiteError(f"{len(items)} items cannot be divided into training, validation and test; give more")
    order = np.random.default_rng((seed, 20261127)).permutation(inner)
    held = {"test": set(order[:each]), "validation": set(order[each : 2 * each])}
    held["training"] = set(range(len(items))) - held["test"] - held["validation"]
    return [item for i, item in enumerate(items) if i in held[split]]


def _draw_until(draw: Draw, split: Split, seed: int, name: str, size: int, rng: np.random.Generator) -> Batch:
    kept: list[Batch] = []
    found = 0
    for _ in range(_MOST_DRAWS):
        drawn = draw(name, size, rng)
        rows = [i for i, tokens in enumerate(drawn.tokens) if split_of(tokens, seed) == split]
        kept.append(Batch(drawn.tokens[rows], drawn.targets[rows]))
        found += len(rows)
        if found >= size:
            return _joined(kept, size)
    raise SuiteError(f"bin {name!r} has too few sequences for a {split} split; train on longer ones (--lengths)")


def _joined(batches: list[Batch], size: int) -> Batch:
    """The first `size` rows of several batches, padded to one length."""
    length = max(batch.tokens.shape[1] for batch in batches)
    padded = [
        [
            np.pad(part, ((0, 0), (0, length - part.shape[1])), constant_values=fill)
            for part, fill in zip(batch, (PAD, IGNORE))
        ]
        for batch in batches
    ]
    return Batch(*(np.concatenate(parts)[:size] for parts in zip(*padded)))
