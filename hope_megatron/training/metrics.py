"""metrics.jsonl: the local truth about a run. One line per recorded step; names are paths (`train/loss`).

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

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hope_megatron.runtime.files import write_text

METRICS_FILE = "metrics.jsonl"

Record = dict[str, Any]


class MetricsFile:
    """Appends records to metrics.jsonl; a line is written whole and flushed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the record of a step."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def drop_after(self, step: int) -> int:
        """Remove records later than a step, and a last line that a crash cut short. Returns how many lines went."""
        if not self.path.exists():
            return 0
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if (record := _parse(line)) is not None and record["step"] <= step]
        if len(kept) < len(lines):
            write_text(self.path, "".join(kept))
        return len(lines) - len(kept)


def read_metrics(path: Path) -> list[Record]:
    """Records of a metrics.jsonl in order; a last line that is still being written is left out."""
    return read_metrics_from(path, 0)[0]


def read_metrics_from(path: Path, offset: int) -> tuple[list[Record], int]:
    """Records from a byte offset on, and the offset to continue from."""
    records: list[Record] = []
    if not path.exists():
        return records, offset
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            record = _parse(line.decode("utf-8", "replace"))
            if record is not None:
                records.append(record)
    return records, offset


def _parse(line: str) -> Record | None:
    if not line.endswith("\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
