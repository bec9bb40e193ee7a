"""A small world of facts in words of its own: entities with attributes, stated in documents and asked in other words.

A statement is "name SAY value", a question "ASK name value": another word, in another order. Known entities are stated and asked
again and again in pretraining. New ones come by day, stated once, never asked; their names are known from fictions, whose values
hold for one document only. From fictions a model learns to read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hope_megatron.suites.task import IGNORE, Batch, Split

EOS = 1  # 0 is padding
ATTRIBUTES, VALUES, ENTITIES = 2, 16, 160
_SAY = 2
_ASK = _SAY + ATTRIBUTES
_NAME = _ASK + ATTRIBUTES
_VALUE = _NAME + ENTITIES
VOCAB = _VALUE + ATTRIBUTES * VALUES
ROW, READ = 72, 37  # tokens of a row of pretraining, and of a document that is read by day
_SENTENCES, _TOLD = ROW // 3, READ // 3
_IN_FICTION = _IN_DOCUMENT = 4  # entities
_FICTIONS = 0.75  # share of pretraining


@dataclass(frozen=True)
class World:
    """Entities (numbers of a pair of names) and their values [2], each from 0 to 15."""

    known: dict[int, np.ndarray]
    days: tuple[dict[int, np.ndarray], ...]

    @classmethod
    def of(cls, seed: int, *, known: int, days: int, new: int) -> World:
        """A world of a seed; every day has `new` entities that were never heard of."""
        rng = np.random.default_rng((seed, 41))
        entities = rng.permutation(ENTITIES)[: known + days * new]
        facts = {int(e): rng.integers(0, VALUES, ATTRIBUTES) for e in entities}
        items = list(facts.items())
        cut = [dict(items[known + d * new : known + (d + 1) * new]) for d in range(days)]
        return cls(dict(items[:known]), tuple(cut))

    def draw(self, size: int, rng: np.random.Generator) -> Batch:
        """Rows of pretraining: most of them fictions, the others about what is known."""
        return _batch([self._fiction(rng) if rng.random() < _FICTIONS else self._known_row(rng) for _ in range(size)])

    def documents(self, day: int, rng: np.random.Generator) -> np.ndarray:
        """The rows that a day brings [R, READ + 1]: documents with every new fact stated once and some old news, each followed by
        one of old news alone."""
        new, rows = list(self.days[day].items()), []
        for first in range(0, len(new), _IN_DOCUMENT):
            told = [statement(e, a, v) for e, vs in new[first : first + _IN_DOCUMENT] for a, v in enumerate(vs)]
            for part in (told + self._old(_TOLD - len(told), rng), self._old(_TOLD, rng)):
                rows.append([EOS, *(token for i in rng.permutation(len(part)) for token in part[i]), EOS])
        return np.array(rows)

    def told_in(self, day: int, row: int) -> dict[int, np.ndarray]:
        """The new facts of a row of `documents`."""
        new = list(self.days[day].items())
        return dict(new[_IN_DOCUMENT * (row // 2) : _IN_DOCUMENT * (row // 2 + 1)]) if row % 2 == 0 else {}

    def questions(self, facts: dict[int, np.ndarray], split: Split) -> Batch:
        """Every fact asked, without a context. A third of the entities is for validation, the others are for the test."""
        asked = [e for i, e in enumerate(sorted(facts)) if (i % 3 == 0) == (split == "validation")]
        rows = [question(e, a, v) for e in asked for a, v in enumerate(facts[e])]
        tokens = np.array([[EOS, *row[:-1]] for row in rows])
        targets = np.full_like(tokens, IGNORE)
        targets[:, -1] = [row[-1] for row in rows]
        return Batch(tokens, targets)

    def _fiction(self, rng: np.random.Generator) -> np.ndarray:
        free = [e for e in rng.permutation(ENTITIES).tolist() if e not in self.known][:_IN_FICTION]
        facts = [(e, a, int(rng.integers(VALUES))) for e in free for a in range(ATTRIBUTES)]
        told = [statement(*fact) for fact in facts] + self._old(_TOLD - len(facts), rng)
        told = [told[i] for i in rng.permutation(_TOLD)]
        picked = rng.integers(0, len(facts), _SENTENCES - _TOLD)
        return _row(told + [(question if rng.random() < 0.7 else statement)(*facts[i]) for i in picked])

    def _known_row(self, rng: np.random.Generator) -> np.ndarray:
        asked = rng.choice([1.0, 0.5])
        picked = rng.choice(list(self.known), _SENTENCES)
        facts = [(int(e), int(a)) for e, a in zip(picked, rng.integers(0, ATTRIBUTES, _SENTENCES))]
        return _row([(question if rng.random() < asked else statement)(e, a, int(self.known[e][a])) for e, a in facts])

    def _old(self, count: int, rng: np.random.Generator) -> list[list[int]]:
        picked = zip(rng.choice(list(self.known), count), rng.integers(0, ATTRIBUTES, count))
        return [statement(int(e), int(a), int(self.known[int(e)][a])) for e, a in picked]


def statement(entity: int, attribute: int, value: int) -> list[int]:
    """name SAY value"""
    return [_NAME + entity, _SAY + attribute, _VALUE + attribute * VALUES + int(value)]


def question(entity: int, attribute: int, value: int) -> list[int]:
    """ASK name value"""
    return [_ASK + attribute, _NAME + entity, _VALUE + attribute * VALUES + int(value)]


def _row(sentences: list[list[int]]) -> np.ndarray:
    tokens = [EOS, *(token for sentence in sentences for token in sentence)][: ROW + 1]
    return np.array(tokens + [EOS] * (ROW + 1 - len(tokens)))


def _batch(rows: list[np.ndarray]) -> Batch:
    stacked = np.stack(rows).astype(np.int64)
    return Batch(stacked[:, :-1], np.ascontiguousarray(stacked[:, 1:]))
