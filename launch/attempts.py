"""The history of a run's attempts, and what follows from it: when to give up, which nodes to avoid.

An attempt is one start of the ranks. `attempts.jsonl` holds a line when it starts and one when it ends; an attempt without
an end was cut off, by a dead node or a kill. Standard library only.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hope_megatron.runtime.records import append_record, parse_records, read_object, read_records

FINISHED = "finished"
"""All steps are done."""
STOPPED = "stopped"
"""Asked to stop (time limit, preemption, cancel), saved and left."""
CRASHED = "crashed"
"""A rank failed."""
UNHEALTHY = "unhealthy"
"""The node check failed; the ranks did not start."""
LOST = "lost"
"""No end was recorded: the node of the supervisor died, or Slurm killed everything."""
GAVE_UP = "gave up"
"""No further attempt will be made."""

_NEEDED = ("step", "train/tokens")


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks."""

    number: int
    """Counted from 1."""
    job_id: str
    """Of the batch system, or what stands for it."""
    restart: int
    """How often Slurm had requeued the job."""
    nodes: tuple[str, ...]
    started: float
    """Unix time."""
    step: int
    """Step of the newest checkpoint when it started."""
    ended: float | None = None
    outcome: str = LOST
    reason: str = ""
    last_step: int | None = None
    """Step of the newest checkpoint when it ended."""
    bad_nodes: tuple[str, ...] = field(default=())
    """Nodes that the failure is put down to."""
    slow_nodes: tuple[str, ...] = field(default=())
    """Nodes that were slow to its end, where slow nodes are left out."""
    kind: str = ""
    """Of a failure: USER, CRASH or TRANSIENT (hope_megatron/runtime/failures.py)."""
    signature: str = ""
    """Of an error of the program: its class and line."""
    furthest: int = 0
    """The last step that was under way."""
    detected: float | None = None
    """Unix time at which the supervisor saw the failure."""

    @property
    def reached(self) -> int:
        """How far it came: the step under way, or of its newest checkpoint."""
        return max(self.furthest, self.last_step or 0, self.step)


class History:
    """The attempts of a run, oldest first. One supervisor writes; anybody may read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempts: list[Attempt] = []
        self.given_up = ""
        """Why no further attempt will be made; empty while there may be one."""
        self._waiting: list[dict[str, Any]] = []
        self._first = 0  # attempts before this one belong to earlier submissions
        records, self.damaged = read_records(path)
        """Attempts and numbers of lines that are not what was written."""
        for record in records:
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # of another version
                self._apply(record)

    def start(self, job_id: str, restart: int, nodes: list[str], step: int) -> Attempt:
        """Record that an attempt begins."""
        attempt = Attempt(len(self.attempts) + 1, job_id, restart, tuple(nodes), time.time(), step)
        self._append({"event": "start", **asdict(attempt)})
        return attempt

    def end(
        self,
        outcome: str,
        reason: str,
        step: int,
        bad_nodes: list[str] | None = None,
        **more: str | int | float | list[str] | None,
    ) -> None:
        """Record how the latest attempt ended. `more`: kind, signature, furthest, detected, slow_nodes."""
        number = self.attempts[-1].number
        values = {
            **more,
            "ended": time.time(),
            "outcome": outcome,
            "reason": reason,
            "last_step": step,
            "bad_nodes": bad_nodes or [],
        }
        self._append({"event": "end", "number": number, **values})

    def give_up(self, reason: str) -> None:
        """Record that no further attempt will be made."""
        self._append({"event": GAVE_UP, "time": time.time(), "reason": reason})

    def submitted(self) -> None:
        """Record that a person submits the run: counters start afresh."""
        self._append({"event": "submitted", "time": time.time()})

    @property
    def is_first_attempt(self) -> bool:
        """Whether this submission has made no attempt yet, or is making its first."""
        return len(self.attempts) - self._first <= 1

    @property
    def current(self) -> list[Attempt]:
        """The attempts of this submission."""
        return self.attempts[self._first :]

    def fruitless(self) -> list[Attempt]:
        """The latest failed attempts of this submission in a row none of which came further than all before it."""
        best: int | None = None
        found: list[Attempt] = []
        for attempt in self.current:
            best = attempt.step if best is None else best
            if attempt.reached > best:
                best, found = attempt.reached, []
            elif attempt.outcome in (CRASHED, LOST):
                found.append(attempt)
        return found

    def unhealthy_in_a_row(self) -> int:
        """Node checks of this submission that failed one after the other, up to the latest."""
        attempts = reversed(self.attempts[self._first :])
        return len(list(itertools.takewhile(lambda a: a.outcome == UNHEALTHY, attempts)))

    def avoided_nodes(self, max_failures: int) -> list[str]:
        """Nodes that failed the check, were slow for long, or to which `max_failures` failed attempts are put down."""
        failures: Counter[str] = Counter()
        for attempt in self.attempts:
            failures.update(dict.fromkeys(attempt.bad_nodes, max_failures if attempt.outcome == UNHEALTHY else 1))
            failures.update(dict.fromkeys(attempt.slow_nodes, max_failures))
        return sorted(node for node, count in failures.items() if count >= max_failures)

    def _append(self, record: dict[str, Any]) -> None:
        """Write a record; while the disk takes none they wait in memory, and the run goes on."""
        self._waiting.append(record)
        self._apply(record)
        with contextlib.suppress(OSError):
            while self._waiting:
                append_record(self.path, self._waiting[0])
                self._waiting.pop(0)

    def _apply(self, record: dict[str, Any]) -> None:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        event = values.pop("event")
        if event == "start":
            self.attempts.append(Attempt(**values))
        elif event == "end":
            self.attempts = [replace(a, **values) if a.number == values["number"] else a for a in self.attempts]
        elif event == "submitted":
            self._first, self.given_up = len(self.attempts), ""
        else:
            self.given_up = values["reason"]


def newest_checkpoint_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint (one with a manifest); 0 if there is none."""
    numbers = [path.parent.name.partition("-")[2] for path in (run_dir / "checkpoints").glob("step-*/manifest.json")]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def is_finished(run_dir: Path, steps: int) -> bool:
    """Whether the run's own summary says that all steps are done."""
    summary = read_object(run_dir / "summary.json") or {}
    step = summary.get("step")
    return summary.get("complete") is True and isinstance(step, int) and step >= steps


def last_record(run_dir: Path) -> dict[str, Any]:
    """The last good record of a training step in metrics.jsonl; empty if there is none."""
    return next(reversed(last_records(run_dir)), {})


def last_records(run_dir: Path, tail_bytes: int = 65536) -> list[dict[str, Any]]:
    """The good records of training steps in the last bytes of metrics.jsonl, oldest first."""
    path = run_dir / "metrics.jsonl"
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - tail_bytes))
            data = file.read()
    except OSError:
        return []
    whole = parse_records(data[data.find(b"\n{") + 1 : data.rfind(b"\n") + 1]).records
    return [record for record in whole if all(isinstance(record.get(name), int) for name in _NEEDED)]
