"""Wall time of a run by phase."""

from __future__ import annotations

import time


class PhaseClock:
    """Seconds between marks: `mark("model")` ends the phase of that name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def mark(self, phase: str) -> None:
        """End a phase; one that comes again adds up."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def rounded(self) -> dict[str, float]:
        """Seconds by phase, to the millisecond."""
        return {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}
