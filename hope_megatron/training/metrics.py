"""metrics.jsonl: the local truth about a run. One line per recorded step; names are paths (`train/loss`), and the last
member of a line, `crc`, is its checksum (runtime/records.py).

| name | unit | what |
|---|---|---|
| train/loss | nats per token | mean over the valid tokens of the step's global batch |
| train/grad_norm | | global norm before clipping |
| train/lr | | learning rate of matrices |
| train/tokens, train/samples | | consumed since step 0 |
| heldout/loss | nats per token | mean over the held-out sequences |
| heldout/loss_new, loss_pair, loss_run | nats per token | of targets that complete a pair new to their sequence, one that |
| | | stood there before, four tokens that did (eval/token_kinds.py); not under context parallelism |
| heldout/loss_ema | nats per token | the same with averaged weights, where `training.ema` keeps them |
| optim/* | | what the optimizer reports of its last step |
| memory/*, cms/* | | how memories and levels fare: see hope_megatron/eval/memory_health.py |
| speed/tokens_per_s | tokens/s | over all ranks, since the last record |
| speed/tokens_per_s_per_gpu | tokens/s | the same per process |
| speed/mfu | | on GPUs: share of the bf16 peak that forward and backward take, once each; mfu_outer, mfu_inner: its parts |
| speed/hfu | | the same with what backward computes again |
| gpu/allocated_gib, gpu/reserved_gib, gpu/peak_gib | GiB | of the fullest rank; the peak since the last record |
| time/communication_s | s | the host waited in collectives (seldom on GPUs) since the last record, slowest rank |
| time/data_stall_s | s | steps waited for their batches since the last record, on the slowest rank |
| time/wall_s | s | spent in steps since step 0 |
| time/start_*_s | s | phases of the start-up (phases.py), in the first record of each start |
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping
from pathlib import Path

from hope_megatron.runtime.files import write_text
from hope_megatron.runtime.records import Record, append_whole, damage_text, parse_records, seal

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
MAX_WAITING = 10_000


class MetricsFile:
    """Appends records to metrics.jsonl; a line is written whole and flushed.

    A disk that is full or gone does not stop training: records wait in memory, the newest `MAX_WAITING` of them, and are written
    when it takes them again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: collections.deque[str] = collections.deque(maxlen=MAX_WAITING)
        self._failing = False

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the record of a step, behind those that wait."""
        self._waiting.append(seal({"step": step, **metrics}) + "\n")
        self.flush()

    def flush(self) -> None:
        """Write what waits, if the disk takes it."""
        try:
            while self._waiting:
                append_whole(self.path, self._waiting[0].encode())
                self._waiting.popleft()
        except OSError as error:
            if not self._failing:
                log.error(
                    "%s cannot be written (%s): records wait in memory, training goes on", self.path, error.strerror
                )
            self._failing = True
            return
        if self._failing:
            log.warning("%s is written again", self.path)
            self._failing = False

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
            write_text(self.path, "".join(seal(record) + "\n" for record in kept))
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
