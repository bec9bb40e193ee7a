"""metrics.jsonl: the local truth about a run. One line per recorded step; names are paths (`train/loss`), and the last
member of a line, `crc`, is its checksum (runtime/records.py).

| name | unit | what |
|---|---|---|
| train/loss | nats per token | mean over the valid tokens of the step's global batch |
| train/grad_norm | | global norm before clipping |
| train/lr | | learning rate of matrices |
| train/tokens, train/samples | | consumed since step 0 |
| heldout/loss | nats per token | mean over the held-out sequences |
| optim/* | | what the optimizer reports of its last step |
| memory/*, cms/* | | how memories and levels fare: see hope_megatron/eval/memory_health.py |
| speed/tokens_per_s | tokens/s | over all ranks, since the last record |
| time/data_stall_s | s | steps waited for their batches since the last record, on the slowest rank |
| time/wall_s | s | spent in steps since step 0 |
| time/start_*_s | s | phases of the start-up (phases.py), in the first record of each start |
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from hope_megatron.runtime.records import Record, damage_text, parse_records, seal

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends records to metrics.jsonl; a line is written whole and flushed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the record of a step."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(seal({"step": step, **metrics}) + "\n")

    def drop_after(self, step: int) -> int:
        """Remove records later than a step, damaged lines, which are named in the log, and a last line that a crash cut short.
        Returns how many lines went.
        """
        if not self.path.exists():
            return 0
        data = self.path.read_bytes()
        records, damaged = _parse(data[: data.rfind(b"\n") + 1])
        if damaged:
            log.warning("%s", damage_text(self.path, damaged))
        kept = [record for record in records if record["step"] <= step]
        dropped = len(data.splitlines()) - len(kept)
        if dropped:
            temporary = self.path.with_suffix(".tmp")
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(seal(record) + "\n" for record in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        return dropped


def read_metrics(path: Path) -> list[Record]:
    """Good records of a metrics.jsonl in order; a last line that is still being written is left out."""
    return read_metrics_from(path, 0)[0]


def read_metrics_from(path: Path, offset: int) -> tuple[list[Record], int]:
    """Good records from a byte offset on, and the offset to continue from."""
    if not path.exists():
        return [], offset
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data.rfind(b"\n") + 1
    return _parse(data[:whole])[0], offset + whole


def _parse(data: bytes) -> tuple[list[Record], list[int]]:
    """(records of whole lines, numbers of damaged lines)"""
    records, damaged = parse_records(data)
    return [record for record in records if type(record.get("step")) is int], damaged
