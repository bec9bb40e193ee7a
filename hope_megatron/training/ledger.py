"""ledger.jsonl: what a run did that its configuration alone does not tell. Skipped steps, recomputed ones, spikes, rollbacks,
silent corruption, stragglers: one sealed line each. A rollback is what the ledger says it is: its samples stay skipped.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from hope_megatron.runtime.records import append_record, damage_text, read_records

log = logging.getLogger(__name__)

_SAME = ("event", "step", "first_sample")


class RunLedger:
    """Entries of one run. Rank 0 writes; an entry that a run that was started again makes a second time is written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, damaged = read_records(path)
        if damaged:
            log.warning("%s", damage_text(path, damaged))
        self._unwritten: list[dict[str, Any]] = []

    def record(self, event: str, step: int, first_sample: int, num_samples: int, **more: Any) -> bool:
        """Add an entry. A full disk does not stop training: what could not be written is written with the next entry.

        Returns:
            Whether it is safe on disk.
        """
        entry = {"event": event, "step": step, "first_sample": first_sample, "num_samples": num_samples, **more}
        if any(all(old.get(name) == entry[name] for name in _SAME) for old in self.entries):
            return not self._unwritten
        self.entries.append(entry)
        self._unwritten.append({**entry, "time": time.time()})
        return self.flush()

    @property
    def has_unwritten(self) -> bool:
        """Whether entries wait for the disk."""
        return bool(self._unwritten)

    def flush(self) -> bool:
        """Write what could not be written before. Whether everything is on disk now."""
        try:
            while self._unwritten:
                append_record(self.path, self._unwritten[0])
                self._unwritten.pop(0)
        except OSError as error:
            log.warning("%s cannot be written (%s): its entries wait", self.path, error.strerror)
            return False
        return True

    def skipped_samples(self) -> list[tuple[int, int]]:
        """(first, end) of the samples that rollbacks left out."""
        return [
            (entry["first_sample"], entry["first_sample"] + entry["num_samples"])
            for entry in self.entries
            if entry.get("event") == "rollback"
        ]

    def count(self, event: str) -> int:
        """Entries of a kind."""
        return sum(entry.get("event") == event for entry in self.entries)


def next_sample(first: int, batch_size: int, skipped: list[tuple[int, int]]) -> int:
    """Where the next global batch begins: `first`, or behind the skipped samples that it would touch."""
    for begin, end in sorted(skipped):
        if first < end and first + batch_size > begin:
            first = end
    return first
