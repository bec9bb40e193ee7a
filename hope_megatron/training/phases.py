"""Wall time of a run by phase."""

from __future__ import annotations

import os
import time

from hope_megatron.runtime.process import launch_time, process_start_time

START_UP = ("launch", "python", "data", "imports", "rendezvous", "model", "checkpoint", "first_step")
"""Phases until training runs: from the allocation (or the launcher's start) to the process, its interpreter and the command,
opening data, importing libraries, joining the other ranks, building model and optimizer, loading a checkpoint, the first step."""


class PhaseClock:
    """Seconds between marks: `mark("model")` ends the phase of that name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    @classmethod
    def of_this_process(cls) -> PhaseClock:
        """A clock that knows what came before: how long the launcher took to start this process, and Python until now."""
        clock, began, launched = cls(), process_start_time(), launch_time(os.environ)
        if began is not None:
            if launched is not None:
                clock.seconds["launch"] = max(0.0, began - launched)
            clock.seconds["python"] = max(0.0, time.time() - began)
        return clock

    def mark(self, phase: str) -> None:
        """End a phase; one that comes again adds up."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def rounded(self) -> dict[str, float]:
        """Seconds by phase, to the millisecond."""
        return {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}

    def start_up(self) -> dict[str, float]:
        """Seconds of the phases of the start-up, in their order."""
        seconds = self.rounded()
        return {phase: seconds[phase] for phase in START_UP if phase in seconds}
