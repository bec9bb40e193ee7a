"""What follows from a run's attempts: try again, after which pause, or stop. No clock, no process: a table of rules.

A user's mistake stops at once. The same error of the program at the same step twice stops: it would come a third time. Other
errors stop after `max_restarts` attempts in a row that came no further, faults of machines, disks and networks only after
`max_transient_restarts`. Coming further, by a step or a checkpoint, counts as progress, so that failures before the first
checkpoint count no faster than others.
"""

from __future__ import annotations

from typing import NamedTuple

from hope_megatron.runtime.failures import CRASH, TRANSIENT, USER
from launch.attempts import CRASHED, LOST, Attempt, History

MAX_DELAY_S = 60.0
_DELAY_S = 1.0


class Verdict(NamedTuple):
    """What to do after the latest attempt."""

    stop: str
    """Why no further attempt is made; empty to make one."""
    delay_s: float = 0.0
    """Pause before it, in which a fault that meets several restarts may pass."""


def judge(history: History, max_restarts: int, max_transient_restarts: int) -> Verdict:
    """What follows from the attempts so far."""
    failed = [attempt for attempt in history.current if attempt.outcome in (CRASHED, LOST)]
    latest = history.current[-1] if history.current else None
    if latest is None or latest.outcome not in (CRASHED, LOST):
        return Verdict("")
    if latest.kind == USER:
        return Verdict(latest.reason)
    fruitless = history.fruitless()
    if len(failed) > 1 and latest in fruitless and _is_the_same(failed[-2], latest):
        return Verdict(f"the same error came at the same step in two attempts: {latest.reason}")
    for kinds, limit, name in (
        ((CRASH,), max_restarts, "max_restarts"),
        ((TRANSIENT, ""), max_transient_restarts, "max_transient_restarts"),
    ):
        count = sum(attempt.kind in kinds for attempt in fruitless)
        if count > limit:
            return Verdict(
                f"{count} attempts failed without coming further ({name}={limit}); the last one: {latest.reason}"
            )
    return Verdict("", min(_DELAY_S * 2.0 ** max(len(fruitless) - 1, 0), MAX_DELAY_S))


def _is_the_same(before: Attempt, latest: Attempt) -> bool:
    """Whether an error of the program came again at its place."""
    return (
        before.kind == latest.kind == CRASH
        and bool(latest.signature)
        and (before.signature, before.furthest) == (latest.signature, latest.furthest)
    )
