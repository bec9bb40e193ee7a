"""What a night is trained on: rows with a teacher's answers. Every sample is a function of its number."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hope_megatron.consolidation.errors import ConsolidationError
from hope_megatron.consolidation.replay import Experience


@dataclass(frozen=True)
class Rows:
    """R rows of one kind."""

    inputs: np.ndarray
    """[R, T] int32."""
    draws: np.ndarray
    """[R, T, D] int32; -100 where nothing is asked."""
    surprise: np.ndarray
    """[R] float64, not negative."""

    @classmethod
    def of(cls, experiences: Sequence[Experience]) -> Rows:
        """Put rows together; there is at least one."""
        return cls(
            np.stack([e.inputs for e in experiences]).astype(np.int32),
            np.stack([e.draws for e in experiences]).astype(np.int32),
            np.array([e.surprise for e in experiences], np.float64),
        )

    def chances(self, priority: float) -> np.ndarray:
        """How often each row is replayed, [R]: in proportion to surprise^priority; 0 replays all alike."""
        if priority == 0 or not self.surprise.any():
            return np.full(len(self.surprise), 1 / len(self.surprise))
        weights = np.maximum(self.surprise, 1e-12) ** priority
        return weights / weights.sum()


@dataclass
class NightSource:
    """A `SampleSource` of [2, T] samples: tokens, and for each an answer of its teacher, drawn anew every time.

    Args:
        rows: by kind ("replay", "dreams", "general").
        shares: of the samples, by kind; they add up to 1.
        priority: of surprise among the replayed rows.
    """

    rows: Mapping[str, Rows]
    shares: Mapping[str, float]
    priority: float = 1.0
    seed: int = 0
    end_id: int = 0
    seq_length: int = field(init=False)
    num_samples: int = field(init=False)
    """Rows that there are."""
    _chances: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seq_length = next(iter(self.rows.values())).inputs.shape[1]
        self.num_samples = sum(len(rows.inputs) for rows in self.rows.values())
        for kind, rows in self.rows.items():
            self._chances[kind] = rows.chances(self.priority if kind == "replay" else 0.0)

    def sample(self, number: int, first: int = 0, stop: int | None = None) -> np.ndarray:
        """[2, T] int64: tokens and what they are to be answered with, -1 where nothing is asked. Only whole samples."""
        if first or stop is not None:
            raise ConsolidationError("a night reads whole sequences; set parallel.context_parallel=1")
        rng = np.random.default_rng((self.seed, number))
        kinds = list(self.shares)
        kind = kinds[int(rng.choice(len(kinds), p=np.fromiter(self.shares.values(), float)))]
        rows = self.rows[kind]
        row = int(rng.choice(len(rows.inputs), p=self._chances[kind]))
        answers = rows.draws[row]
        drawn = answers[np.arange(len(answers)), rng.integers(answers.shape[1], size=len(answers))]
        return np.stack([rows.inputs[row], np.where(drawn < 0, -1, drawn)]).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that a sample depends on."""
        digest = hashlib.sha256(repr((dict(self.shares), self.priority, self.seed)).encode())
        for kind, rows in sorted(self.rows.items()):
            for part in (kind.encode(), rows.inputs.tobytes(), rows.draws.tobytes(), rows.surprise.tobytes()):
                digest.update(part)
        return digest.hexdigest()

    def state(self, number: int) -> dict[str, Any]:
        """The position before a sample."""
        return {"sample": number, "night": self.fingerprint}

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The sample number of a saved position, if it is of this night."""
        if state.get("night") != self.fingerprint:
            raise ConsolidationError(
                "the checkpoint belongs to another night: its replay is not the one that is here. Give the options that the night "
                "was begun with, or another --out"
            )
        return int(state["sample"])
