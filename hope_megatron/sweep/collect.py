"""What finished cells measured, as observations that laws are fitted to."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hope_megatron.eval.token_kinds import METRICS
from hope_megatron.runtime.files import replacing
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.frontier import Curve
from hope_megatron.sweep.laws import Array
from hope_megatron.sweep.plan import Cell, Plan
from hope_megatron.sweep.store import State, SweepDirectory
from hope_megatron.training.metrics import METRICS_FILE, read_metrics

_LAST_SHARE = 0.1
"""Share of the steps at the end over which training loss is averaged."""
_SMOOTHING_SHARE = 0.05
"""Window of the smoothed training curve, as a share of its points."""

UniqueTokens = Callable[[Path | str], int]
"""How many tokens a manifest of training shards holds."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A finished run."""

    name: str
    family: str
    parameters: float
    tokens: float
    flops: float
    loss: float
    """Nats per token."""
    width: int = 1
    base_lr: float = math.nan
    """optim.lr, which counts at the base width under muP."""
    batch_tokens: float = math.nan
    unique_tokens: float = math.nan
    """Tokens in the training data; fewer than `tokens` means repeated epochs."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values on the sweep's axes."""
    kinds: dict[str, float] = field(default_factory=dict)
    """Held-out loss by kind of target, by the names of `METRICS` (hope_megatron/eval/token_kinds.py), where it was measured."""
    curve: Curve | None = None

    @property
    def epochs(self) -> float:
        """Passes over the data; NaN when its size is not known."""
        return self.tokens / self.unique_tokens


def collect(plan: Plan, directory: SweepDirectory, unique_tokens: UniqueTokens) -> list[Observation]:
    """Observations of the cells that have finished.

    Raises:
        SweepError: if none has, or one lacks the loss that is to be fitted.
    """
    finished = [cell for cell in plan.cells if directory.state(cell) is State.FINISHED]
    if not finished:
        raise SweepError(
            f"no cell of {plan.sweep.name} has finished; `hope sweep run` runs them, `hope sweep status` shows them"
        )
    counts = {path: unique_tokens(path) for path in {cell.config.data.train for cell in finished}}
    return [_observe(plan, cell, directory, counts[cell.config.data.train]) for cell in finished]


def _observe(plan: Plan, cell: Cell, directory: SweepDirectory, unique_tokens: int) -> Observation:
    metrics = directory.runs / cell.name / METRICS_FILE
    records = read_metrics(metrics)
    parameters = cell.num_parameters if plan.sweep.fit.parameters == "total" else cell.num_non_embedding
    train = [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]
    if plan.sweep.fit.loss == "heldout":
        heldout = [record["heldout/loss"] for record in records if "heldout/loss" in record]
        if not heldout:
            raise SweepError(f"{metrics} has no heldout/loss; give data.heldout in the base run, or set fit.loss=train")
        loss = heldout[-1]
    else:
        last = [value for step, value in train if step > (1 - _LAST_SHARE) * cell.config.training.steps]
        if not last:
            raise SweepError(f"{metrics} has no train/loss near its end; set fit.loss=heldout")
        loss = float(np.mean(last))
    return Observation(
        name=cell.name,
        family=cell.family,
        parameters=float(parameters),
        tokens=float(cell.tokens),
        flops=cell.flops,
        loss=float(loss),
        width=cell.config.model.hidden_size,
        base_lr=cell.config.optim.lr,
        batch_tokens=float(cell.config.training.tokens_per_step),
        unique_tokens=float(unique_tokens),
        settings=cell.settings,
        kinds=last_kinds(records),
        curve=_curve(cell, float(parameters), train),
    )


def last_kinds(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Losses by kind of target of the last evaluation; {} where there are none."""
    found = [
        {name: record[name] for name in METRICS if name in record} for record in records if "heldout/loss" in record
    ]
    return found[-1] if found else {}


def _curve(cell: Cell, parameters: float, train: Sequence[tuple[int, float]]) -> Curve | None:
    if len(train) < 3:
        return None
    steps, loss = (np.array(column, dtype=np.float64) for column in zip(*train, strict=True))
    tokens = steps * cell.config.training.tokens_per_step
    return Curve(parameters, tokens * cell.flops_per_token, tokens, _smooth(loss))


def _smooth(values: Array) -> Array:
    """Centred mean, narrower at the ends so that it is not pulled inwards."""
    half = int(len(values) * _SMOOTHING_SHARE / 2)
    reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([values[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


def best_of_tuning(observations: Iterable[Observation]) -> list[Observation]:
    """One observation per family, size, length and amount of data: mean over seeds, then the best setting of the other axes.

    Scaling laws speak of well-tuned runs; the badly tuned ones belong to the laws of what was tuned.
    """
    settings: dict[str, list[Observation]] = {}
    for observation in observations:
        rest = {key: value for key, value in observation.settings.items() if key != "seed"}
        settings.setdefault(_law_key(observation) + json.dumps(rest, sort_keys=True), []).append(observation)
    best: dict[str, Observation] = {}
    for seeds in settings.values():
        kinds = {name: float(np.mean([seed.kinds[name] for seed in seeds])) for name in _common_kinds(seeds)}
        mean = replace(seeds[0], loss=float(np.mean([seed.loss for seed in seeds])), kinds=kinds)
        key = _law_key(mean)
        if key not in best or mean.loss < best[key].loss:
            best[key] = mean
    return list(best.values())


def _common_kinds(seeds: Sequence[Observation]) -> set[str]:
    return set.intersection(*(set(seed.kinds) for seed in seeds))


def _law_key(run: Observation) -> str:
    """What a loss law sees of a run."""
    return json.dumps([run.family, run.parameters, run.tokens, run.unique_tokens])


def write_csv(observations: Sequence[Observation], path: Path) -> None:
    """All observations as a table."""
    axes = sorted({key for observation in observations for key in observation.settings})
    columns = [
        "name",
        "family",
        "parameters",
        "tokens",
        "flops",
        "loss",
        "width",
        "base_lr",
        "batch_tokens",
        "unique_tokens",
    ]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns + axes)
        for observation in observations:
            values = [getattr(observation, name) for name in columns]
            values = ["" if isinstance(value, float) and math.isnan(value) else value for value in values]
            table.writerow([*values, *(observation.settings.get(axis, "") for axis in axes)])


def read_csv(path: Path) -> list[Observation]:
    """Observations from a table with the columns parameters, tokens and loss; family, name, flops, ... where it has them.

    Without a column flops, 6 N D is taken.

    Raises:
        SweepError: if the file cannot be read, a column is missing, or a value is not a positive number.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SweepError(f"{path} cannot be read as CSV: {error}") from None
    missing = [name for name in ("parameters", "tokens", "loss") if not rows or name not in rows[0]]
    if missing:
        raise SweepError(
            f"{path} has no rows with {', '.join(missing)}; its first line must name the columns parameters, tokens and loss"
        )
    return [_from_row(row, path, number) for number, row in enumerate(rows, start=2)]


def _from_row(row: dict[str, str], path: Path, number: int) -> Observation:
    def value(name: str, default: float) -> float:
        text = row.get(name) or ""
        if not text and default != 0.0:
            return default
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not 0 < found < math.inf:
            raise SweepError(f"{path}, line {number}: {name} must be a positive number, not {text!r}")
        return found

    parameters, tokens = value("parameters", 0.0), value("tokens", 0.0)
    return Observation(
        name=row.get("name") or f"line {number}",
        family=row.get("family") or "runs",
        parameters=parameters,
        tokens=tokens,
        flops=value("flops", 6 * parameters * tokens),
        loss=value("loss", 0.0),
        width=round(value("width", 1)),
        base_lr=value("base_lr", math.nan),
        batch_tokens=value("batch_tokens", math.nan),
        unique_tokens=value("unique_tokens", math.nan),
    )
