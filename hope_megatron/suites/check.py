"""Does a record repeat? Some of its cells are run again and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.models import same_model
from hope_megatron.suites.registry import build_suite
from hope_megatron.suites.results import outcomes, plain, read_record
from hope_megatron.suites.suite import Cell, Outcome, Suite, SuiteOptions

Verdict = Literal["same bits", "inside the spread", "outside the spread"]
_MARGIN = 0.05  # added to the range over seeds on either side, as a share of it or of 1


class Comparison(NamedTuple):
    """A figure of a cell, as recorded and as found now."""

    cell: Cell
    weights: str
    name: str
    recorded: float
    found: float
    low: float
    """Smallest and largest of the record's seeds, with a margin."""
    high: float

    @property
    def verdict(self) -> Verdict:
        """Equal bits are expected of the same commit on the same machine, figures within the spread over seeds elsewhere."""
        if self.recorded == self.found or (np.isnan(self.recorded) and np.isnan(self.found)):
            return "same bits"
        return "inside the spread" if self.low <= self.found <= self.high else "outside the spread"


def options_of(stored: Mapping[str, Any]) -> SuiteOptions:
    """The options a record was made with, for every task and family that it has a cell of."""
    families = dict.fromkeys(row["subject"].split(": ")[0] for row in stored["cells"])
    given = {**stored["options"], "families": list(families), "tasks": None}
    for name in ("families", "tasks", "lengths", "hope"):
        given[name] = tuple(given[name]) if given.get(name) is not None else None
    given["hope"] = given["hope"] or ()
    given["data"] = tuple(Path(path) for path in given.get("data") or ())
    return SuiteOptions(**given)


def suite_of(path: Path) -> tuple[Suite, dict[Cell, Outcome]]:
    """The suite of a record, built by today's code, and the record's tested cells.

    Raises:
        SuiteError: if today's code has other settings for it, or the record has no tested cell.
    """
    stored = read_record(path)
    try:
        suite = build_suite(stored["suite"], options_of(stored))
        found = {cell: outcome for cell, (outcome, _) in outcomes(stored).items() if outcome.scores}
        ours, theirs = plain(suite.settings), stored["settings"]
        changed = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        known = suite.models.keys() & stored["models"].keys()
        changed += [f"model of {name}" for name in known if not same_model(stored["models"][name], suite.models[name])]
    except (KeyError, TypeError) as error:
        raise SuiteError(f"{path} cannot be read as a record of a suite ({error!r})") from None
    if changed:
        raise SuiteError(
            f"{path} was made with other settings ({', '.join(sorted(changed))}); "
            f"check out its commit {stored['provenance'].get('commit')}"
        )
    if not found:
        raise SuiteError(f"{path} has no tested cell yet; run its suite further")
    return suite, found


def check_record(path: Path, count: int, seed: int, tell: Callable[[str], None] = print) -> list[Comparison]:
    """Run a random sample of a record's tested cells again.

    Args:
        count: how many cells.
        seed: which ones.
        tell: gets a line per cell.

    Raises:
        SuiteError: see `suite_of`.
    """
    suite, recorded = suite_of(path)
    cells = list(recorded)
    picked = np.random.default_rng(seed).permutation(len(cells))[:count]
    compared: list[Comparison] = []
    for number, index in enumerate(picked, 1):
        cell = cells[index]
        tell(f"[{number}/{len(picked)}] {cell}")
        again = suite.run(cell)
        compared += _compare(cell, recorded, again)
    return compared


def _compare(cell: Cell, recorded: Mapping[Cell, Outcome], again: Outcome) -> list[Comparison]:
    seeds = [o for other, o in recorded.items() if other._replace(seed=0) == cell._replace(seed=0)]
    found = []
    for weights, scores in recorded[cell].scores.items():
        for name, value in scores.items():
            values = [o.scores[weights][name] for o in seeds]
            margin = _MARGIN * max(1.0, abs(max(values)))
            found.append(
                Comparison(
                    cell, weights, name, value, again.scores[weights][name], min(values) - margin, max(values) + margin
                )
            )
    return found
