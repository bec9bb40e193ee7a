"""What all streams of samples share: batches over ranks, document boundaries, and a position to resume from."""

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
    document: int  # number of the document in the shard
    offset: int  # tokens of the document before this piece; 0 means that the document begins here
    dataset: str = ""  # name within a mixture

    @property
    def begins_document(self) -> bool:
        return self.offset == 0


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
    def tokenizer_sha256(self) -> str:
        """Digest of the tokenizer whose ids the samples hold."""

    @abstractmethod
    def fill(self, number: int, out: np.ndarray) -> None:
        """Write sample ``number`` into ``out``, int64 [seq_length + 1]."""

    @abstractmethod
    def documents(self, number: int) -> list[DocumentSpan]:
        """The pieces of documents that sample ``number`` is made of, in order and without gaps."""

    @abstractmethod
    def provenance(self, span: DocumentSpan) -> dict[str, Any]:
        """Where the document of a span comes from: source file, position, SHA-256."""

    # ---- samples

    def sample(self, number: int) -> np.ndarray:
        """Sample ``number``, from 0 without end (epochs follow each other): int64 [seq_length + 1]."""
        out = np.empty(self.seq_length + 1, dtype=np.int64)
        self.fill(number, out)
        return out

    def sample_with_documents(self, number: int) -> tuple[np.ndarray, list[DocumentSpan]]:
        """A sample and its document boundaries, for resetting states and masking the loss."""
        return self.sample(number), self.documents(number)

    def batch(
        self, step: int, global_batch: int, dp_rank: int = 0, dp_size: int = 1, micro_batch: int | None = None
    ) -> np.ndarray:
        """This rank's part of global batch ``step``: samples ``step * global_batch`` and following.

        Rank r of n takes the r-th n-th, so the ranks' parts in their order are the global batch for every n.

        Returns:
            int64 [global_batch / dp_size, seq_length + 1], or with ``micro_batch``
            [num_micro_batches, micro_batch, seq_length + 1].
        """
        first, count = rank_samples(step, global_batch, dp_rank, dp_size)
        if micro_batch is not None and (micro_batch < 1 or count % micro_batch):
            raise SamplingError(
                f"micro_batch={micro_batch} does not divide the {count} samples per rank "
                f"(global_batch={global_batch}, dp_size={dp_size}). Choose a divisor of {count}."
            )
        out = np.empty((count, self.seq_length + 1), dtype=np.int64)
        for row in range(count):
            self.fill(first + row, out[row])
        return out if micro_batch is None else out.reshape(-1, micro_batch, self.seq_length + 1)

    # ---- position

    def state(self, number: int) -> dict[str, Any]:
        """The position before sample ``number``, as JSON values, for a checkpoint."""
        return {
            "sample": number,
            "fingerprint": self.fingerprint,
            "tokenizer_sha256": self.tokenizer_sha256,
            "description": self.description,
        }

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The number of the next sample of a saved position.

        Raises:
            DataChangedError: the position belongs to other data or another order; the message lists the differences.
        """
        if state.get("skips"):
            raise DataChangedError(
                f"samples were skipped before the position was saved ({state['skips']}). Read through the ledger of "
                f"that run (SkippingStream)."
            )
        return self._checked_sample(state)

    def _checked_sample(self, state: Mapping[str, Any]) -> int:
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


def rank_samples(step: int, global_batch: int, dp_rank: int, dp_size: int) -> tuple[int, int]:
    """Number of a rank's first sample in a step, and how many it takes."""
    if step < 0 or global_batch < 1 or dp_size < 1 or not 0 <= dp_rank < dp_size:
        raise SamplingError(
            f"no such batch: step={step}, global_batch={global_batch}, dp_rank={dp_rank}, dp_size={dp_size}."
        )
    if global_batch % dp_size:
        raise SamplingError(
            f"global_batch={global_batch} does not divide over {dp_size} data-parallel ranks. "
            f"Choose a multiple of {dp_size}, or another number of ranks."
        )
    count = global_batch // dp_size
    return step * global_batch + dp_rank * count, count


def document_ids(spans: list[DocumentSpan]) -> np.ndarray:
    """Number of the document within the sample, for every token: int64 [seq_length + 1], from 0."""
    return np.repeat(np.arange(len(spans)), [span.stop - span.start for span in spans])


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
