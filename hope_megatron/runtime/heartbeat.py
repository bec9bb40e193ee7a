"""What a rank is doing, in a file that another process can read however the rank hangs.

A rank writes into a small shared mapping: its phase, since when, and how long the phase may take; and the collective that it is
in. Writing costs about a microsecond and no system call. The node's watchdog (launch/watchdog.py) reads it. The position
`(phases entered, collectives begun)` is the same on all ranks at the same place of the program, so the smallest is behind.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import mmap
import os
import signal
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HEARTBEAT_DIR_VARIABLE = "HOPE_HEARTBEAT_DIR"
"""Directory of this node in which ranks keep their heartbeats and stacks."""
STACKS_SIGNAL = signal.SIGUSR2
"""A rank that gets it writes the stacks of all its threads, without the interpreter's help."""

_PHASE = struct.Struct("<iiqddQ32s")
_COLLECTIVE = struct.Struct("<Qd32s")
_SINCE = struct.Struct("<d")
_SIZE = _PHASE.size + _COLLECTIVE.size
_WINDOW = 25


@dataclass(frozen=True)
class Limits:
    """Seconds without progress after which a rank counts as hanging, by kind of phase."""

    min_s: float = 30.0
    """Shortest limit of a phase of a step."""
    step_factor: float = 5.0
    """A phase of a step may take so many median steps."""
    start_up_s: float = 900.0
    """Each phase of the start."""
    first_step_s: float = 1800.0
    """Each phase of the first step."""
    evaluation_s: float = 1800.0
    """An evaluation, and a measurement of the memories."""
    save_s: float = 1800.0
    """What training waits for in a save."""


class Beat(NamedTuple):
    """A heartbeat as the watchdog reads it. Times are of CLOCK_MONOTONIC, which all processes of a node share."""

    pid: int
    rank: int
    step: int
    """The step under way; 0 before the first."""
    since: float
    limit_s: float
    entered: int
    """Phases entered so far."""
    phase: str
    collectives: int
    """Collectives begun so far."""
    collective_since: float
    """0 outside of collectives."""
    collective: str
    """The last one begun."""

    @property
    def position(self) -> tuple[int, int]:
        """Place in the program; of ranks that wait for each other, the smallest is behind."""
        return self.entered, self.collectives

    def overdue_s(self, now: float) -> float:
        """Seconds by which the phase has outlasted its limit; negative while it has not."""
        return now - self.since - self.limit_s


class Heartbeat:
    """The heart of this process. Until `attach`, it beats where nobody looks."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.rank = 0
        self.step = 0
        self.phase = "start-up"
        self.listeners: list[Callable[[str, int], None]] = []
        """Called with (phase, step) after each is entered; for faults that tests inject."""
        self.waited_s = 0.0
        """Spent in collectives so far."""
        self._memory = mmap.mmap(-1, _SIZE)
        self._entered = self._collectives = 0
        self._durations: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._step_began = 0.0
        self._step_limit_s = 0.0  # not known yet
        self._first_step = True

    def attach(self, directory: Path, rank: int) -> None:
        """Beat in a file of `directory` from now on, and leave the stacks there on STACKS_SIGNAL."""
        self.rank = rank
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(stack_file(directory, rank), "w") as stacks:
            faulthandler.register(STACKS_SIGNAL, file=os.dup(stacks.fileno()), all_threads=True)
        path = beat_file(directory, rank)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w+b") as file:
            file.truncate(_SIZE)
            self._memory = mmap.mmap(file.fileno(), _SIZE)
        self.enter(self.phase, self.limits.start_up_s)
        os.replace(temporary, path)

    def enter(self, phase: str, limit_s: float | None = None) -> None:
        """A phase begins. `limit_s`: how long it may take; None means the limit of a step's phases."""
        self.phase = phase
        self._entered += 1
        limit = (self._step_limit_s or self.limits.first_step_s) if limit_s is None else limit_s
        _PHASE.pack_into(
            self._memory,
            0,
            os.getpid(),
            self.rank,
            self.step,
            time.monotonic(),
            limit,
            self._entered,
            phase.encode()[:32],
        )
        for listener in self.listeners:
            listener(phase, self.step)

    def begin_step(self, step: int) -> None:
        """Step `step` (1 is the first) begins."""
        self.step, self._step_began = step, time.monotonic()

    def end_step(self) -> None:
        """The step has ended; how long it took counts for the limit of the next ones."""
        if not self._first_step:
            self._durations.append(time.monotonic() - self._step_began)
            median = statistics.median(self._durations)
            self._step_limit_s = max(self.limits.min_s, self.limits.step_factor * median)
        self._first_step = False

    def begin_collective(self, name: str) -> None:
        """A collective begins."""
        self._collectives += 1
        _COLLECTIVE.pack_into(self._memory, _PHASE.size, self._collectives, time.monotonic(), name.encode()[:32])

    def end_collective(self) -> None:
        """It runs in the background, or has ended."""
        _SINCE.pack_into(self._memory, _PHASE.size + 8, 0.0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for the end of a collective: for the ranks that have not come to it yet."""
        began = time.monotonic()
        _SINCE.pack_into(self._memory, _PHASE.size + 8, began)
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - began
            self.end_collective()


HEART = Heartbeat()
"""This process's own."""


def attach_heartbeat(rank: int) -> None:
    """Beat where the launcher looks, if there is one that does."""
    if directory := os.environ.get(HEARTBEAT_DIR_VARIABLE):
        HEART.attach(Path(directory), rank)


def beat_file(directory: Path, rank: int) -> Path:
    """Heartbeat of a rank."""
    return directory / f"beat-{rank:05d}"


def stack_file(directory: Path, rank: int) -> Path:
    """Stacks of a rank."""
    return directory / f"stack-{rank:05d}.txt"


def read_beat(path: Path) -> Beat | None:
    """The heartbeat in a file; None if there is none (yet)."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _SIZE:
        return None
    pid, rank, step, since, limit_s, entered, phase = _PHASE.unpack_from(data)
    collectives, collective_since, collective = _COLLECTIVE.unpack_from(data, _PHASE.size)
    return Beat(
        pid, rank, step, since, limit_s, entered, _text(phase), collectives, collective_since, _text(collective)
    )


def read_beats(directory: Path) -> list[Beat]:
    """Heartbeats of all ranks of this node, by rank."""
    return [beat for path in sorted(directory.glob("beat-*[0-9]")) if (beat := read_beat(path)) is not None]


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")
