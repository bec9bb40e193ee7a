"""Where every cell of a sweep stands."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from hope_megatron.sweep.plan import Cell, Plan
from hope_megatron.sweep.store import State, SweepDirectory
from hope_megatron.training.metrics import METRICS_FILE, read_metrics

_COLOURS = {
    State.WAITING: "dim",
    State.RUNNING: "cyan",
    State.INTERRUPTED: "yellow",
    State.FAILED: "yellow",
    State.SET_ASIDE: "red",
    State.FINISHED: "green",
}


@dataclass(frozen=True)
class CellStatus:
    """A cell at this moment."""

    cell: Cell
    state: State
    step: int
    """Last recorded step."""
    loss: float | None
    """Last recorded loss: held-out once there is one, training before."""
    tokens_per_s: float | None
    reason: str

    @property
    def seconds_left(self) -> float | None:
        """Time that the remaining steps take at the last recorded speed."""
        if self.state is not State.RUNNING or not self.tokens_per_s:
            return None
        training = self.cell.config.training
        return (training.steps - self.step) * training.tokens_per_step / self.tokens_per_s

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "cell": self.cell.name,
            "state": self.state.value,
            "step": self.step,
            "steps": self.cell.config.training.steps,
            "loss": self.loss,
            "tokens_per_s": self.tokens_per_s,
            "seconds_left": self.seconds_left,
            "reason": self.reason,
        }


def sweep_status(plan: Plan, directory: SweepDirectory) -> list[CellStatus]:
    """All cells, in the order of the plan."""
    return [_status(cell, directory) for cell in plan.cells]


def goes_on(statuses: Sequence[CellStatus]) -> bool:
    """Whether a cell runs or will: a sweep that is queued, or between two cells, has not ended."""
    return any(status.state not in (State.FINISHED, State.SET_ASIDE) for status in statuses)


def status_table(statuses: Sequence[CellStatus], title: str) -> Table:
    """The table of `hope sweep status`."""
    counts = Counter(status.state for status in statuses)
    summary = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    table = Table(title=f"{title}: {summary}", title_justify="left", box=None, pad_edge=False)
    for name in ("cell", "state", "step", "loss", "tokens/s", "left", ""):
        table.add_column(name, justify="left" if name in ("cell", "state", "") else "right", header_style="dim")
    for status in statuses:
        colour = _COLOURS[status.state]
        table.add_row(
            status.cell.name,
            f"[{colour}]{status.state.value}[/{colour}]",
            f"{status.step}/{status.cell.config.training.steps}",
            "" if status.loss is None else f"{status.loss:.4f}",
            "" if status.tokens_per_s is None else f"{status.tokens_per_s:,.0f}",
            "" if status.seconds_left is None else time.strftime("%H:%M:%S", time.gmtime(status.seconds_left)),
            status.reason[:80],
        )
    return table


def _status(cell: Cell, directory: SweepDirectory) -> CellStatus:
    records = read_metrics(directory.runs / cell.name / METRICS_FILE)
    last = {name: value for record in records for name, value in record.items()}
    state = directory.state(cell)
    return CellStatus(
        cell=cell,
        state=state,
        step=int(last.get("step", 0)),
        loss=last.get("heldout/loss", last.get("train/loss")),
        tokens_per_s=last.get("speed/tokens_per_s"),
        reason="" if state is State.FINISHED else directory.reason(cell),
    )
