"""From a sweep file to cells: resolved run configurations with their parameters, tokens, FLOPs, hours and price."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hope_megatron.config.accounting import num_non_embedding, num_parameters
from hope_megatron.config.footprint import estimate, footprint
from hope_megatron.config.hardware import find_hardware
from hope_megatron.config.load import read_mapping, resolve_run_config
from hope_megatron.config.model import ModelConfig
from hope_megatron.config.presets import find_config
from hope_megatron.config.run import RunConfig
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.schema import SweepConfig
from hope_megatron.sweep.sizes import ladder, train_flops_per_token

MIN_STEPS = 10
"""A cell with fewer optimizer steps measures its warm-up."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of a sweep."""

    name: str
    """Name of its run and of its directory."""
    family: str
    """Name in the sweep file."""
    config: RunConfig
    settings: dict[str, Any]
    """Value on each axis."""
    num_parameters: int
    num_non_embedding: int
    tokens: int
    """Training tokens, a whole number of steps."""
    flops_per_token: float
    """Model FLOPs per trained token, forward and backward."""
    hours: float
    """Estimated time."""
    device_hours: float
    usd: float
    bytes_per_device: float

    @property
    def flops(self) -> float:
        """Training FLOPs of the cell."""
        return self.tokens * self.flops_per_token


@dataclass(frozen=True)
class Plan:
    """All cells of a sweep, in the order in which they run: cheapest first, so that mistakes show early."""

    sweep: SweepConfig
    cells: tuple[Cell, ...]

    @property
    def device_hours(self) -> float:
        """Estimated hours of all cells, summed over devices."""
        return sum(cell.device_hours for cell in self.cells)

    @property
    def usd(self) -> float:
        """Estimated price of all cells."""
        return sum(cell.usd for cell in self.cells)

    def facts(self) -> dict[str, Any]:
        """For programs."""
        cells = [
            {
                "cell": cell.name,
                "family": cell.family,
                "settings": cell.settings,
                "parameters": cell.num_parameters,
                "tokens": cell.tokens,
                "steps": cell.config.training.steps,
                "lr": cell.config.optim.lr,
                "flops": cell.flops,
                "bytes_per_device": cell.bytes_per_device,
                "hours": cell.hours,
                "device_hours": cell.device_hours,
                "usd": cell.usd,
            }
            for cell in self.cells
        ]
        return {"sweep": self.sweep.name, "device_hours": self.device_hours, "usd": self.usd, "cells": cells}

    def cell(self, name: str) -> Cell:
        """The cell of a name.

        Raises:
            SweepError: if there is none.
        """
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise SweepError(f"the sweep {self.sweep.name} has no cell {name!r}; `hope sweep plan` lists them")


def make_plan(sweep: SweepConfig) -> Plan:
    """Resolve every cell.

    Raises:
        ConfigError: a cell's configuration is wrong; the message names the key.
        SweepError: two cells coincide, or a cell is too short.
    """
    cells = sorted(_cells(sweep), key=lambda cell: cell.hours)
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SweepError(
            f"{twice[0]} names two cells of the sweep {sweep.name}; sizes, tokens or axis values lie too close together"
        )
    return Plan(sweep, tuple(cells))


def check_budget(plan: Plan) -> None:
    """Refuse a plan that does not fit into its hardware or its budget.

    Raises:
        SweepError: naming every cell that does not fit, and what to change.
    """
    sweep, problems = plan.sweep, []
    hardware = find_hardware(sweep.hardware.name)
    for cell in plan.cells:
        if cell.bytes_per_device > hardware.memory_bytes:
            problems.append(
                f"{cell.name} needs {cell.bytes_per_device / 1e9:.1f} GB per device, {hardware.name} has "
                f"{hardware.memory_bytes / 1e9:.0f} GB; "
                "lower training.micro_batch_size, set training.recompute=layer, or shard more"
            )
    for what, need, limit in (
        ("device hours", plan.device_hours, sweep.budget.device_hours),
        ("US dollars", plan.usd, sweep.budget.usd),
    ):
        if limit is not None and need > limit:
            problems.append(
                f"the cells need about {need:.3g} {what}, the budget is {limit:.3g}; drop cells or raise budget"
            )
    if problems:
        raise SweepError(
            "\n  - ".join([f"the sweep {sweep.name} does not fit:", *problems]) if len(problems) > 1 else problems[0]
        )


def _cells(sweep: SweepConfig) -> Iterator[Cell]:
    axes = dict(sweep.axes)
    if sweep.seeds:
        axes["seed"] = sweep.seeds
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    for family, keys in sweep.families.items():
        start = _resolve(sweep, {**keys, "training.steps": _PLACEHOLDER_STEPS, "optim.warmup_steps": 0})
        models: list[ModelConfig | None] = [None]
        if sweep.sizes is not None:
            models = [*ladder(start.model, sweep.sizes, start.training.seq_length, start.parallel.tensor_parallel)]
        for model, settings in itertools.product(models, combinations):
            overrides = {**keys, **_model_keys(model), **_axis_keys(settings)}
            for length in _lengths(sweep):
                if model is None or _in_range(sweep, model, start.training.seq_length, length):
                    yield _make_cell(sweep, family, settings, overrides, length)


_PLACEHOLDER_STEPS = 1 << 20


def _lengths(sweep: SweepConfig) -> list[tuple[str, float]]:
    for kind, values in sweep.design.lengths.items():
        return [(kind, float(value)) for value in values]
    return [("base", 0.0)]


def _in_range(sweep: SweepConfig, model: ModelConfig, seq_length: int, length: tuple[str, float]) -> bool:
    """Whether a size is one that a budget trains."""
    if sweep.design.between_tokens_per_parameter is None:
        return True
    low, high = sweep.design.between_tokens_per_parameter
    return low <= length[1] / train_flops_per_token(model, seq_length) / num_parameters(model) <= high


def _make_cell(
    sweep: SweepConfig, family: str, settings: dict[str, Any], overrides: Mapping[str, Any], length: tuple[str, float]
) -> Cell:
    probe_keys = dict(overrides)
    if length[0] != "base":  # the number of steps is not known yet, and must not clash with the warm-up
        probe_keys |= {"optim.warmup_steps": 0, "training.steps": _PLACEHOLDER_STEPS}
    probe = _resolve(sweep, probe_keys)
    wanted = _wanted_tokens(probe, *length)
    steps = round(wanted / probe.training.tokens_per_step)
    name = _cell_name(family, probe.model, wanted, settings)
    if steps < MIN_STEPS:
        raise SweepError(
            f"{name} would train for {steps} steps of {probe.training.tokens_per_step} tokens, fewer than {MIN_STEPS}; "
            "give it more tokens or FLOPs, or lower training.global_batch_size"
        )
    schedule: dict[str, Any] = {"training.steps": steps, "name": name, "output_dir": str(sweep.directory / "runs")}
    if sweep.warmup_fraction is not None:
        schedule["optim.warmup_steps"] = round(sweep.warmup_fraction * steps)
    if sweep.decay_fraction is not None:
        schedule["optim.decay_steps"] = round(sweep.decay_fraction * steps)
    if sweep.transfer is not None:
        schedule["model.mup.base_width"] = sweep.transfer.base_width
    config = _resolve(sweep, {**overrides, **schedule})
    return _with_costs(sweep, family, settings, config)


def _wanted_tokens(probe: RunConfig, kind: str, value: float) -> float:
    """Training tokens that the design asks for."""
    if kind == "isoflop_budgets":
        return value / train_flops_per_token(probe.model, probe.training.seq_length)
    if kind == "tokens_per_parameter":
        return value * num_parameters(probe.model)
    return value if kind == "tokens" else float(probe.training.tokens)


def _with_costs(sweep: SweepConfig, family: str, settings: dict[str, Any], config: RunConfig) -> Cell:
    hardware, devices = find_hardware(sweep.hardware.name), sweep.hardware.devices
    hours = estimate(config, devices, hardware, sweep.hardware.utilization).hours
    return Cell(
        name=config.name,
        family=family,
        config=config,
        settings=settings,
        num_parameters=num_parameters(config.model),
        num_non_embedding=num_non_embedding(config.model),
        tokens=config.training.tokens,
        flops_per_token=train_flops_per_token(config.model, config.training.seq_length),
        hours=hours,
        device_hours=hours * devices,
        usd=hours * devices * sweep.hardware.usd_per_device_hour,
        bytes_per_device=footprint(config, devices).total,
    )


def _resolve(sweep: SweepConfig, keys: Mapping[str, Any]) -> RunConfig:
    """The base run with dotted keys laid over it."""
    base = dict(sweep.base)
    run = base.pop("run", None)
    data: dict[str, Any] = dict(read_mapping(find_config(run, "runs"))) if run is not None else {}
    data.setdefault("name", sweep.name)
    overrides = [
        f"{key}={json.dumps(value)}" for key, value in {**_flatten(base), **_tracking_keys(sweep), **keys}.items()
    ]
    return resolve_run_config(data, overrides, source=f"sweep {sweep.name}" if run is None else str(run))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _tracking_keys(sweep: SweepConfig) -> dict[str, Any]:
    return {} if sweep.tracking is None else {f"tracking.{key}": value for key, value in sweep.tracking}


def _model_keys(model: ModelConfig | None) -> dict[str, Any]:
    if model is None:
        return {}
    keys = {f"model.{key}": getattr(model, key) for key in ("hidden_size", "num_heads", "head_size", "num_layers")}
    keys["model.cms.levels"] = [level.model_dump(mode="json") for level in model.cms.levels]
    if model.attention.num_kv_heads:
        keys["model.attention.num_kv_heads"] = model.attention.num_kv_heads
    return keys


def _axis_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    keys = dict(settings)
    if "seed" in keys:
        keys["training.seed"] = keys["data.seed"] = keys.pop("seed")
    return keys


def _cell_name(family: str, model: ModelConfig, tokens: float, settings: Mapping[str, Any]) -> str:
    parts = [family, f"w{model.hidden_size}d{model.num_layers}", f"t{_short(tokens)}"]
    parts += [f"{key.rsplit('.', 1)[-1]}{_short(value)}" for key, value in settings.items()]
    return re.sub(r"[^A-Za-z0-9._-]", "", "-".join(parts))


def _short(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return json.dumps(value).strip('"')
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.3g}"
