"""The ledger: what a run did that its data order alone does not tell, and which documents a step saw.

What was read needs no record, because it can be computed again. Only skipped samples, corrupt shards and changes of the
data are written down: one JSON object per line in a file of the run.
"""

from __future__ import annotations

import bisect
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataChangedError, DataError
from data_pipeline.files import writing
from data_pipeline.samples import DocumentSpan, SampleStream

_MEMBERS: Mapping[Any, tuple[str, ...]] = {
    "skip": ("first", "count"),
    "transition": ("sample", "old", "new"),
    "corrupt": ("shard", "location", "sha256"),
}
"""What an entry of each kind has."""


@dataclass(frozen=True, order=True)
class Skip:
    """Samples of a stream that are left out: ``count`` of them from number ``first``."""

    first: int
    count: int


class Ledger:
    """An append-only file of skips, corrupt shards and data transitions; every entry is safe on disk when the call returns.

    The processes of a run may write to one file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def record_skip(self, first: int, count: int, *, step: int, reason: str) -> None:
        """Samples ``first`` to ``first + count - 1`` of the stream, as counted without skips, are left out."""
        if first < 0 or count < 1:
            raise DataError(f"cannot skip {count} samples from number {first}: both must make sense.")
        self._append({"kind": "skip", "first": first, "count": count, "step": step, "reason": reason})

    def record_transition(self, sample: int, old: str, new: str, *, step: int, reason: str) -> None:
        """From this sample on, other data are read; ``old`` and ``new`` are fingerprints. Recorded once."""
        entry = {"kind": "transition", "sample": sample, "old": old, "new": new, "step": step, "reason": reason}
        self._append(entry, once_by=("kind", "sample", "new"))

    def record_corrupt(self, shard: str, location: str, sha256: str, *, reason: str) -> None:
        """A shard is left out because its content is not that of the digest in the manifest. Recorded once."""
        entry = {"kind": "corrupt", "shard": shard, "location": location, "sha256": sha256, "reason": reason}
        self._append(entry, once_by=("kind", "location", "shard", "sha256"))

    def entries(self) -> list[dict[str, Any]]:
        """All entries in order. A last line that a crash cut off was never acknowledged, and is passed over."""
        return self._parse(self.path.read_bytes() if self.path.exists() else b"")

    def _parse(self, data: bytes) -> list[dict[str, Any]]:
        try:
            entries = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        except (ValueError, RecursionError) as error:
            raise DataError(f"the ledger {self.path} is damaged ({error}). Restore it from a copy.") from error
        for number, entry in enumerate(entries, start=1):
            needed = _MEMBERS.get(entry.get("kind"), ("kind",)) if isinstance(entry, dict) else ("kind",)
            if not isinstance(entry, dict) or any(name not in entry for name in needed):
                raise DataError(f"the ledger {self.path} is damaged in line {number}. Restore it from a copy.")
        return entries

    def skips(self) -> list[Skip]:
        return [Skip(entry["first"], entry["count"]) for entry in self.entries() if entry["kind"] == "skip"]

    def _append(self, entry: dict[str, Any], once_by: tuple[str, ...] = ()) -> None:
        """Add an entry, unless there is one with the same values under ``once_by``."""
        line = json.dumps({**entry, "time": time.time()}, sort_keys=True).encode() + b"\n"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
                file.seek(0)
                data = file.read()
                if once_by and any(all(old.get(k) == entry[k] for k in once_by) for old in self._parse(data)):
                    return
                file.truncate(data.rfind(b"\n") + 1)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())


class SkippingStream(SampleStream):
    """A stream with samples left out: those after a skip move up.

    A position saved before a skip was decided stays valid, as long as only samples that come after it are skipped.
    """

    def __init__(self, stream: SampleStream, skips: Iterable[Skip]) -> None:
        self.stream = stream
        self.skips = _merged(skips)
        self.seq_length = stream.seq_length
        self.num_samples, self.end_id = stream.num_samples, stream.end_id
        # for each skip, the number that the first sample behind it gets, and how far everything has moved up by then
        self._moves = list(itertools.accumulate((skip.count for skip in self.skips), initial=0))
        self._starts = [skip.first - moved for skip, moved in zip(self.skips, self._moves, strict=False)]
        super().__init__()

    @property
    def tokenizer_sha256(self) -> str:
        return self.stream.tokenizer_sha256

    @property
    def description(self) -> dict[str, Any]:
        return self.stream.description

    def source_number(self, number: int) -> int:
        """The number of a sample in the stream without skips."""
        return number + self._moves[bisect.bisect_right(self._starts, number)]

    def fill(self, number: int, out: np.ndarray) -> None:
        self.stream.fill(self.source_number(number), out)

    def documents(self, number: int) -> list[DocumentSpan]:
        return self.stream.documents(self.source_number(number))

    def provenance(self, span: DocumentSpan) -> dict[str, Any]:
        return self.stream.provenance(span)

    def state(self, number: int) -> dict[str, Any]:
        return {**super().state(number), "skips": [[skip.first, skip.count] for skip in self.skips]}

    def check_state(self, state: Mapping[str, Any]) -> int:
        number = self._checked_sample(state)
        old = SkippingStream(self.stream, [Skip(*skip) for skip in state.get("skips", [])])
        passed = old.source_number(number)  # everything below has been read or skipped
        if _clipped(old.skips, passed) != _clipped(self.skips, passed):
            raise DataChangedError(
                f"the skips before sample {passed} are {_clipped(self.skips, passed)} now and were "
                f"{_clipped(old.skips, passed)} when the position was saved. Use the ledger of that run."
            )
        return number


def _merged(skips: Iterable[Skip]) -> list[Skip]:
    """Sorted, with overlapping and adjacent skips joined."""
    merged: list[Skip] = []
    for skip in sorted(skips):
        if merged and skip.first <= merged[-1].first + merged[-1].count:
            last = merged.pop()
            skip = Skip(last.first, max(last.first + last.count, skip.first + skip.count) - last.first)
        merged.append(skip)
    return merged


def _clipped(skips: list[Skip], end: int) -> list[tuple[int, int]]:
    """(first, last + 1) of the parts of skips that lie below ``end``."""
    return [(skip.first, min(end, skip.first + skip.count)) for skip in skips if skip.first < end]


def documents_in_step(stream: SampleStream, step: int, global_batch: int) -> list[dict[str, Any]]:
    """The documents that a step's global batch was made of, each once, with provenance and the samples it is in.

    Computed from the stream, so it answers for any step of any run on these data, also before it is run.
    """
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for number in range(step * global_batch, (step + 1) * global_batch):
        for span in stream.documents(number):
            key = (span.dataset, span.shard, span.document)
            if key not in found:
                where = {"dataset": span.dataset} if span.dataset else {}
                found[key] = {
                    **where, "shard": span.shard, "document": span.document, "samples": [], **stream.provenance(span),
                }  # fmt: skip
            samples = found[key]["samples"]
            if not samples or samples[-1] != number:
                samples.append(number)
    return list(found.values())
