"""How much of a run's life trained: from its attempts and its metrics. Standard library only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from hope_megatron.runtime.records import read_records
from launch.attempts import History


@dataclass(frozen=True)
class RealGoodput:
    """Seconds of a run's life, from its first attempt on."""

    total_s: float
    productive_s: float
    """Steps that count, each once."""
    saves_s: float
    """What training waited for in saves."""
    queued_s: float
    """Between attempts."""

    @property
    def lost_s(self) -> float:
        """Everything else: starts, steps that were done again, detection, evaluations."""
        return max(0.0, self.total_s - self.productive_s - self.saves_s - self.queued_s)

    def __str__(self) -> str:
        parts = {"productive": self.productive_s, "saves": self.saves_s, "lost": self.lost_s, "queued": self.queued_s}
        return ", ".join(f"{name} {100 * seconds / self.total_s:.1f} %" for name, seconds in parts.items())


def real_goodput(run_dir: Path, history: History) -> RealGoodput | None:
    """Of a run that has attempts and recorded steps; None for others."""
    attempts = history.attempts
    records = [r for r in read_records(run_dir / "metrics.jsonl").records if isinstance(r.get("time/wall_s"), float)]
    if not attempts or not records:
        return None
    ends = [attempt.ended or time.time() for attempt in attempts]
    queued = sum(max(0.0, after.started - end) for after, end in zip(attempts[1:], ends))
    saves = sum(float(record.get("checkpoint/stall_s", 0.0)) for record in records)
    total = max(ends[-1] - attempts[0].started, 1e-9)
    return RealGoodput(total, float(records[-1]["time/wall_s"]), saves, queued)
