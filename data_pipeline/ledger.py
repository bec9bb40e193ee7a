"""The ledger: what a run read that its data order alone does not tell.

What was read needs no record, because it can be computed again. Only corrupt shards and changes of the data are written
down: one JSON object per line in a file of the run.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files import writing

_MEMBERS: Mapping[Any, tuple[str, ...]] = {
    "transition": ("sample", "old", "new"),
    "corrupt": ("shard", "location", "sha256"),
}
"""What an entry of each kind has."""


class Ledger:
    """An append-only file of corrupt shards and data transitions; every entry is safe on disk when the call returns.

    The processes of a run may write to one file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def record_transition(
        self, sample: int, old: str, new: str, *, step: int, reason: str, old_recipe: Mapping[str, Any] | None = None
    ) -> None:
        """From this sample on, other data are read. Recorded once.

        Args:
            sample: number of the first.
            old, new: fingerprints.
            step: finished steps.
            reason: in the user's words.
            old_recipe: how the data before can be opened again (`SampleStream.recipe`).
        """
        entry = {"kind": "transition", "sample": sample, "old": old, "new": new, "step": step, "reason": reason}
        self._append({**entry, "old_recipe": old_recipe}, once_by=("kind", "sample", "new"))

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


class UnwrittenLedger(Ledger):
    """The ledger of a run for those who only look: what they find is not recorded."""

    def _append(self, entry: dict[str, Any], once_by: tuple[str, ...] = ()) -> None:
        pass
