"""When a level of the continuum memory system is updated: its period, which may change over the run (eq. 71). No torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

Changes = tuple[tuple[int, int], ...]
"""(steps before it, the period from then on), in order."""


@dataclass(frozen=True)
class UpdateClock:
    """A function of the number of optimizer steps that were made, and of nothing else: what resumes, resumes exactly.

    A change falls on an update, so that no gradient is gathered over two periods.
    """

    first: int
    """Period from the first step on."""
    changes: Changes = ()

    @property
    def longest(self) -> int:
        """The longest period. At 1 no gradient is ever gathered."""
        return max(self.first, *(period for _, period in self.changes), 1)

    def period(self, step: int) -> int:
        """The period that step number `step`, counted from 1, belongs to."""
        return self._piece(step)[1]

    def due(self, step: int) -> bool:
        """Whether step number `step` makes an update."""
        before, period = self._piece(step)
        return (step - before) % period == 0

    def updates(self, step: int) -> int:
        """Updates made by the first `step` steps."""
        done = 0
        for before, end, period in self.pieces(step):
            done += (end - before) // period
        return done

    def pieces(self, steps: int) -> Iterator[tuple[int, int, int]]:
        """(first step, last step, period) of every stretch of the first `steps` steps; the first step is not in it."""
        starts = [(0, self.first), *self.changes]
        for (before, period), (after, _) in itertools.pairwise([*starts, (steps, 0)]):
            if before < steps:
                yield before, min(after, steps), period

    def conflict(self) -> str | None:
        """Why there is no such clock, and what to do; None if there is."""
        before, period = 0, self.first
        for step, following in self.changes:
            if step <= before:
                return f"from_step={step} does not come after {before}; list changes in the order of their steps, from 1 on"
            if (step - before) % period:
                near = before + (step - before) // period * period
                choices = f"{near} or {near + period}" if near > before else f"{near + period}"
                return (
                    f"from_step={step} falls between two updates of period {period}, which began after step {before}; "
                    f"set it to {choices}"
                )
            before, period = step, following
        return None

    def text(self) -> str:
        """For people: "8, from step 400 on 2"."""
        return ", ".join([f"{self.first}", *(f"from step {step} on {period}" for step, period in self.changes)])

    def plan(self, steps: int) -> dict[str, object]:
        """Periods and updates of a run of so many steps, as plain data; a change after its end is named apart."""
        return {
            "updates": self.updates(steps),
            "periods": [{"from_step": before, "period": period} for before, _, period in self.pieces(steps)],
            "after_the_run": [step for step, _ in self.changes if step >= steps],
        }

    def _piece(self, step: int) -> tuple[int, int]:
        found = (0, self.first)
        for change in self.changes:
            if change[0] >= step:
                break
            found = change
        return found


@functools.lru_cache(maxsize=256)  # adaptive clocks grow
def update_clock(first: int, changes: Changes = ()) -> UpdateClock:
    """The clock of a period and its changes."""
    return UpdateClock(first, changes)
