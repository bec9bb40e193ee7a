"""MAD, the mechanistic architecture design suite (arXiv 2403.17844): five abilities a token mixer needs.

Sizes are ours. Compression differs: there a decoder rebuilds the sequence from one vector; here the model itself is asked
for the token at each position, in random order, after it has read all of them.
"""

from __future__ import annotations

import numpy as np

from hope_megatron.suites.splits import by_content
from hope_megatron.suites.task import IGNORE, Batch, Draw, Task

BLANK, ASK = 1, 2
FIRST = 3  # first id that is neither padding nor a mark


def compression(length: int, symbols: int = 16) -> Task:
    """`length` random tokens, a mark, then positions in random order: which token stood there?"""

    def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
        told = rng.integers(FIRST, FIRST + symbols, (size, length))
        asked = np.argsort(rng.random((size, length)), axis=1)
        mark = np.full((size, 1), ASK)
        tokens = np.concatenate([told, mark, FIRST + symbols + asked], axis=1)
        targets = np.full_like(tokens, IGNORE)
        targets[:, length + 1 :] = np.take_along_axis(told, asked, axis=1)
        return Batch(tokens, targets)

    return _task("compression", FIRST + symbols + length, f"{length} tokens", draw)


def in_context_recall(length: int, keys: int = 16, values: int = 16) -> Task:
    """Keys and values in turn, a mapping per sequence; asked at each key that was there before."""

    def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
        mapping = rng.integers(FIRST + keys, FIRST + keys + values, (size, keys))
        key = rng.integers(0, keys, (size, length // 2))
        value = np.take_along_axis(mapping, key, axis=1)
        tokens = np.stack([FIRST + key, value], axis=2).reshape(size, -1)
        targets = np.full_like(tokens, IGNORE)
        targets[:, ::2] = np.where(_seen_before(key), value, IGNORE)
        return Batch(tokens, targets)

    return _task("in-context recall", FIRST + keys + values, f"{length} tokens", draw)


def fuzzy_recall(length: int, keys: int = 8, symbols: int = 12) -> Task:
    """As in-context recall, but keys and values are words of one to three tokens; every token of a value is asked."""

    def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
        tokens, targets = np.zeros((size, length), np.int64), np.full((size, length), IGNORE)
        for row, target in zip(tokens, targets):
            _fuzzy_sequence(row, target, keys, symbols, rng)
        return Batch(tokens, targets)

    return _task("fuzzy recall", FIRST + 2 * symbols, f"{length} tokens", draw)


def _fuzzy_sequence(row: np.ndarray, target: np.ndarray, keys: int, symbols: int, rng: np.random.Generator) -> None:
    """Fill one sequence with key and value words; no key word begins another, so that it is known where one ends."""
    words: list[list[int]] = []
    while len(words) < keys:
        word = rng.integers(FIRST, FIRST + symbols, rng.integers(1, 4)).tolist()
        if not any(word[: len(w)] == w or w[: len(word)] == word for w in words):
            words.append(word)
    values = [rng.integers(FIRST + symbols, FIRST + 2 * symbols, rng.integers(1, 4)).tolist() for _ in words]
    position, seen = 0, set()
    while True:
        i = int(rng.integers(keys))
        pair = words[i] + values[i]
        if position + len(pair) > len(row):
            row[position:] = BLANK
            return
        row[position : position + len(pair)] = pair
        if i in seen:
            first = position + len(words[i]) - 1
            target[first : first + len(values[i])] = values[i]
        seen.add(i)
        position += len(pair)


def selective_copying(length: int, copied: int, symbols: int = 16) -> Task:
    """Tokens scattered among blanks; at the end as many marks, where they are to be said in order."""

    def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
        told = rng.integers(FIRST, FIRST + symbols, (size, copied))
        places = np.sort(np.argsort(rng.random((size, length)), axis=1)[:, :copied], axis=1)
        tokens = np.full((size, length + copied), BLANK)
        np.put_along_axis(tokens, places, told, axis=1)
        tokens[:, length:] = ASK
        targets = np.full_like(tokens, IGNORE)
        targets[:, length:] = told
        return Batch(tokens, targets)

    return _task("selective copying", FIRST + symbols, f"{copied} of {length}", draw)


def memorization(facts: int, asked: int, values: int = 16) -> Task:
    """A fixed dictionary that is never told: each key is followed by a mark, at which its value is asked.

    Splits differ in which keys stand together; the facts are the same, as they must be.
    """
    mapping = np.random.default_rng(20240326).integers(FIRST + facts, FIRST + facts + values, facts)

    def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
        key = rng.integers(0, facts, (size, asked))
        tokens = np.stack([FIRST + key, np.full_like(key, ASK)], axis=2).reshape(size, -1)
        targets = np.full_like(tokens, IGNORE)
        targets[:, 1::2] = mapping[key]
        return Batch(tokens, targets)

    return _task("memorization", FIRST + facts + values, f"{facts} facts", draw)


def _task(name: str, vocab_size: int, bin_name: str, draw: Draw) -> Task:
    return Task(name, vocab_size, (bin_name,), by_content(draw, (bin_name,)))


def _seen_before(key: np.ndarray) -> np.ndarray:
    """[B, N] -> whether the same number stands further left in its row."""
    same = key[:, :, None] == key[:, None, :]
    return np.tril(same, -1).any(axis=2)


def mad_tasks(length: int) -> list[Task]:
    """All five, at sequences of about `length` tokens."""
    return [
        compression(length // 2),
        in_context_recall(length),
        fuzzy_recall(length),
        selective_copying(length, length // 8),
        memorization(facts=4 * length, asked=length // 2),
    ]
