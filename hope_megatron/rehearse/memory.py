"""Which bytes are alive at which operator: a log of storages born and freed, cut into segments, and put together again.

A segment is a stretch of the step with one place in the model: `forward/layer`, `backward/head`, `update`. A training step of the
whole model is made of segments that were rehearsed on a model of one layer of each kind.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

ROUND_BYTES = 512
"""CUDA's caching allocator gives memory in multiples of this."""

_TRACE_POINTS = 48


class Segment(NamedTuple):
    """What a stretch of the step does to memory, relative to what was alive when it began."""

    name: str
    """Phase and place, `forward/layer memory`."""
    net: int
    """Bytes that stay when it ends, less those that were there."""
    high: int
    """Largest number of bytes on top of those that were there."""
    trace: tuple[int, ...]
    """Bytes on top, over the segment; a few dozen points that keep every maximum."""
    at_high: Counter[str]
    """By label, at the highest point: bytes born in this segment, less those of older storages that are gone."""
    at_end: Counter[str]
    """The same at the end."""


@dataclass
class _Storage:
    size: int
    label: str
    born: int
    freed: int | None = None


@dataclass
class MemoryLog:
    """Storages and when they lived. Time is the number of operators seen so far."""

    rounded: bool = True
    """Count in the units of CUDA's allocator."""
    time: int = 0
    storages: list[_Storage] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    """(time, name): a segment begins."""
    _alive: dict[int, Any] = field(default_factory=dict)

    def see(self, tensor: Tensor, label: str) -> None:
        """Note the storage of a tensor that an operator returned, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        if self.rounded:
            size = -(-size // ROUND_BYTES) * ROUND_BYTES
        if size == 0:
            return
        record = _Storage(size, label, self.time)
        self.storages.append(record)

        def freed(_reference: Any) -> None:
            self._alive.pop(key, None)
            record.freed = self.time

        self._alive[key] = weakref.ref(storage, freed)

    def begin(self, name: str) -> None:
        """A segment begins here, and the one before ends."""
        self.time += 1  # a moment of its own: what is freed after it belongs to the new segment
        self.marks.append((self.time, name))

    def live_bytes(self) -> int:
        """Bytes alive now."""
        return sum(record.size for record in self.storages if record.freed is None)

    def live(self) -> Counter[str]:
        """Bytes alive now, by label."""
        found: Counter[str] = Counter()
        for record in self.storages:
            if record.freed is None:
                found[record.label] += record.size
        return found

    def peak_bytes(self, start: int = 0) -> int:
        """The most that was alive at once, from a time on."""
        deltas: Counter[int] = Counter()
        for record in self.storages:
            deltas[max(record.born, start)] += record.size
            if record.freed is not None:
                deltas[max(record.freed + 1, start)] -= record.size  # it was there while the last operator ran
        return max(_running(sorted(deltas.items())), default=0)

    def segments(self, first_mark: int) -> list[Segment]:
        """The segments from a mark on (an index into `marks`), the last one until now."""
        marks = self.marks[first_mark:]
        ends = [time for time, _ in marks[1:]] + [self.time + 1]
        born, freed = _by_time(self.storages)
        return [self._segment(name, begin, end, born, freed) for (begin, name), end in zip(marks, ends)]

    def _segment(self, name: str, begin: int, end: int, born: _Index, freed: _Index) -> Segment:
        level, high, high_at, trace = 0, 0, begin - 1, [0]
        for time in range(begin, end):
            # what an operator frees is free before the next one runs; within one, results are there beside operands
            level += sum(record.size for record in born.get(time, ()))
            trace.append(level)
            if level > high:
                high, high_at = level, time
            level -= sum(record.size for record in freed.get(time, ()))
        trace.append(level)
        at_high = _changes(begin, high_at, born, freed)
        return Segment(name, level, high, _thinned(trace), at_high, _changes(begin, end, born, freed))


def _changes(begin: int, time: int, born: _Index, freed: _Index) -> Counter[str]:
    """By label: bytes alive while the operator of `time` runs, less those alive before `begin`."""
    found: Counter[str] = Counter()
    for t in range(begin, time + 1):
        for record in born.get(t, ()):
            found[record.label] += record.size
        if t < time:
            for record in freed.get(t, ()):
                found[record.label] -= record.size
    return found


_Index = dict[int, list[_Storage]]


def _by_time(storages: Iterable[_Storage]) -> tuple[_Index, _Index]:
    born: _Index = {}
    freed: _Index = {}
    for record in storages:
        born.setdefault(record.born, []).append(record)
        if record.freed is not None:
            freed.setdefault(record.freed, []).append(record)
    return born, freed


def _running(changes: Iterable[tuple[int, int]]) -> Iterable[int]:
    level = 0
    for _, change in changes:
        level += change
        yield level


def _thinned(trace: list[int]) -> tuple[int, ...]:
    """At most `_TRACE_POINTS` points: the maximum of each stretch, and the last point."""
    width = -(-len(trace) // _TRACE_POINTS)
    return tuple(max(trace[i : i + width]) for i in range(0, len(trace), width)) + (trace[-1],)
