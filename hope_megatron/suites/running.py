"""Running a suite's missing cells one after the other, each kept as it finishes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from hope_megatron.runtime.formatting import duration_text
from hope_megatron.suites.results import Results
from hope_megatron.suites.suite import Outcome, Suite


def run_suite(
    suite: Suite,
    path: Path | None,
    provenance: Mapping[str, Any],
    others: Iterable[Path] = (),
    tell: Callable[[str], None] = print,
    options: Mapping[str, Any] | None = None,
) -> Results:
    """Run the cells that are not there yet.

    Args:
        path: where finished cells are kept; None keeps them in memory alone.
        provenance: commit, versions and machine, for the record.
        others: files of the same suite, from other machines, whose cells need not be run again.
        tell: gets a line for each finished cell, with about how long the rest will take.
        options: what the user chose, for the record.
    """
    results = Results(suite, path, provenance=provenance, options=options or {})
    results.load(others)
    while (cell := next(results.missing(), None)) is not None:
        started = time.monotonic()
        results.outcomes[cell] = suite.run(cell)
        results.seconds[cell] = round(time.monotonic() - started, 1)
        results.commits[cell] = str(provenance.get("commit") or "")[:12]
        results.save()
        planned = [*results.planned()]
        done, total = sum(kept in results.outcomes for kept in planned), len(planned) + len(results.to_follow())
        took, left = duration_text(results.seconds[cell]), duration_text(_seconds_left(results))
        tell(f"[{done}/{total}] {cell}: {_figures(results.outcomes[cell])} ({took}, {left} left)")
    return results


def _figures(outcome: Outcome) -> str:
    """The test scores of averaged weights where there are any, else the validation scores."""
    if outcome.scores:
        found = outcome.scores.get("averaged") or next(iter(outcome.scores.values()))
        return ", ".join(f"{name}: {value:.3g}" for name, value in found.items())
    return "validation " + ", ".join(f"{kind} {score.value:.3g}" for kind, score in outcome.validation.items())


def _seconds_left(results: Results) -> float:
    """Each missing cell at the mean of others of its task and subject, else of all finished cells."""
    finished: dict[tuple[str, str], list[float]] = {}
    for cell, seconds in results.seconds.items():
        finished.setdefault((cell.task, cell.subject), []).append(seconds)
    everything = [*results.seconds.values()]
    missing = [(cell.task, cell.subject) for cell in results.missing()] + results.to_follow()
    return sum(fmean(finished.get(kind, everything)) for kind in missing)
