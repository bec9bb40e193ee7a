"""What all streams of samples share: samples by number, document boundaries, and a position to resume from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import DataChangedError, SamplingError
from data_pipeline.files import canonical_json

NO_TOKEN = -1
"""Stands in samples for tokens that cannot be read (see `TokenStream`, skip_corrupt). They are no input and no target."""


@dataclass(frozen=True)
class DocumentSpan:
    """A piece of a document in a sample: ``tokens[start:stop]``, its end mark included where it falls in the sample."""

    start: int
    stop: int
    shard: str  # name of the shard
    document: int  # number of the document in the shard; -1 for all that a shard which is left out would hold
    offset: int  # tokens of the document before this piece; 0 means that the document begins here
    dataset: str = ""  # name within a mixture


class SampleStream(ABC):
    """An endless, seekable sequence of samples that is a pure function of the sample number.

    Attributes:
        seq_length: tokens per sample that the model sees; samples are int64 [seq_length + 1].
        num_samples: samples per epoch.
        end_id: the token that ends every document.
        fingerprint: SHA-256 over everything that decides the order and the content.
    """

    seq_length: int
    num_samples: int
    end_id: int

    def __init__(self) -> None:
        self.fingerprint = hashlib.sha256(canonical_json(self.description)).hexdigest()

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Everything that decides the samples, as JSON values; `fingerprint` is its digest."""

    @property
    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """Where the data lie, how they are read, and their fingerprint, as JSON values: `history.open_recipe` opens it."""

    @property
    @abstractmethod
    def tokenizer_sha256(self) -> str:
        """Digest of the tokenizer whose ids the samples hold."""

    @abstractmethod
    def fill(self, number: int, out: np.ndarray, first: int = 0) -> None:
        """Write tokens of sample ``number`` from its token ``first`` on into ``out``, int64 [at most seq_length + 1 - first]."""

    @abstractmethod
    def documents(self, number: int) -> list[DocumentSpan]:
        """The pieces of documents that sample ``number`` is made of, in order and without gaps."""

    @abstractmethod
    def provenance(self, span: DocumentSpan) -> dict[str, Any]:
        """Where the document of a span comes from: source file, position, SHA-256."""

    # ---- samples

    def sample(self, number: int, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Sample ``number``, from 0 without end (epochs follow each other): int64 [seq_length + 1].

        Args:
            number: of the sample.
            first, stop: only its tokens from ``first`` to before ``stop``. Nothing else is read, nor are its shards opened.
        """
        length = self.seq_length + 1
        stop = length if stop is None else stop
        if not 0 <= first < stop <= length:
            raise SamplingError(f"tokens {first} to {stop} of a sample of {length}: there are none.")
        out = np.empty(stop - first, dtype=np.int64)
        self.fill(number, out, first)
        return out

    # ---- position

    def state(self, number: int) -> dict[str, Any]:
        """The position before sample ``number``, as JSON values, for a checkpoint."""
        return {
            "sample": number,
            "fingerprint": self.fingerprint,
            "tokenizer_sha256": self.tokenizer_sha256,
            "description": self.description,
            "recipe": self.recipe,
        }

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The number of the next sample of a saved position.

        Raises:
            DataChangedError: the position belongs to other data or another order; the message lists the differences.
        """
        for key in ("sample", "fingerprint"):
            if key not in state:
                raise DataChangedError(f"the saved data position has no field '{key}': the checkpoint is damaged.")
        if state["fingerprint"] != self.fingerprint:
            differences = describe_changes(state.get("description", {}), self.description)
            raise DataChangedError(
                "the data are not those that the saved position belongs to:\n"
                + "\n".join(f"  {line}" for line in differences)
                + "\nRestore the old data and settings, or make the change on purpose with a data transition "
                "(--data-transition), which is recorded."
            )
        return int(state["sample"])


def describe_changes(old: Any, new: Any, name: str = "") -> list[str]:
    """The differences between two descriptions, one line each, at most 20."""
    lines = _changes(old, new, name)
    return lines if len(lines) <= 20 else [*lines[:20], f"and {len(lines) - 20} more"]


def _changes(old: Any, new: Any, name: str) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted({*old, *new}):
            path = f"{name}.{key}" if name else str(key)
            if key not in new:
                lines.append(f"{path}: gone (was {_short(old[key])})")
            elif key not in old:
                lines.append(f"{path}: new ({_short(new[key])})")
            else:
                lines += _changes(old[key], new[key], path)
        return lines
    return [] if old == new else [f"{name}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
