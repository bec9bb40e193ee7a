"""The sweep file: a base run, model families, sizes, how many tokens, further axes, and what it may cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from hope_megatron.config.base import ConfigError, Section
from hope_megatron.config.load import read_mapping
from hope_megatron.config.messages import explain
from hope_megatron.config.presets import find_config
from hope_megatron.config.training import TrackingConfig

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._]*$"


class SizesConfig(Section):
    """The ladder of model sizes; each family's model is scaled to every rung, keeping its proportions."""

    widths: tuple[int, ...] | None = None
    """Model widths (hidden_size), one per size."""
    flops_per_token: tuple[float, ...] | None = None
    """Training FLOPs per token, one per size: each family takes a width nearby, and the width of its CMS makes up the rest."""
    depths: tuple[int, ...] | None = None
    """Layers, one per size; None keeps the family's ratio of width to depth."""
    head_size: int | None = Field(default=None, gt=0)
    """Head width of every size; None keeps the family's. Widths are multiples of it."""

    @model_validator(mode="after")
    def _check(self) -> SizesConfig:
        if (self.widths is None) == (self.flops_per_token is None):
            raise ConfigError("sizes: give either widths or flops_per_token")
        ladder: tuple[float, ...] = self.widths or self.flops_per_token or ()
        if not ladder or min(ladder) <= 0 or list(ladder) != sorted(set(ladder)):
            raise ConfigError(f"sizes: {list(ladder)} must be positive numbers in increasing order")
        if self.depths is not None and (len(self.depths) != len(ladder) or min(self.depths) < 1):
            raise ConfigError(
                f"sizes.depths={list(self.depths)} must give a number of layers for each of the {len(ladder)} sizes"
            )
        return self


class DesignConfig(Section):
    """How long each size trains: one of the first three; none of them takes training.steps from the base run."""

    isoflop_budgets: tuple[float, ...] | None = Field(default=None, min_length=1)
    """Training FLOPs: every size trains once per budget, on as many tokens as the budget buys it."""
    tokens: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Training tokens: every size trains once on each number."""
    tokens_per_parameter: tuple[float, ...] | None = Field(default=None, min_length=1)
    """Training tokens per parameter of the size."""
    between_tokens_per_parameter: tuple[float, float] | None = None
    """With budgets: only sizes around the optimum, whose tokens per parameter lie in this range, are trained on each."""

    @property
    def lengths(self) -> dict[str, tuple[float, ...]]:
        """What is given of budgets, tokens and tokens per parameter."""
        kinds = ("isoflop_budgets", "tokens", "tokens_per_parameter")
        return {kind: getattr(self, kind) for kind in kinds if getattr(self, kind) is not None}

    @model_validator(mode="after")
    def _check(self) -> DesignConfig:
        given = self.lengths
        if len(given) > 1:
            raise ConfigError(f"design: {' and '.join(given)} exclude each other; keep one")
        for name, values in given.items():
            if min(values) <= 0 or len(set(values)) < len(values):
                raise ConfigError(f"design.{name}={list(values)} must be different positive numbers")
        if self.between_tokens_per_parameter is not None:
            low, high = self.between_tokens_per_parameter
            if not 0 < low < high or self.isoflop_budgets is None:
                raise ConfigError(
                    f"design.between_tokens_per_parameter=[{low:g}, {high:g}] goes with isoflop_budgets, and must grow"
                )
        return self


class TransferConfig(Section):
    """One learning rate for all widths: sets model.mup of every cell (muP, arXiv 2203.03466)."""

    base_width: int = Field(gt=0)
    """Width at which optim.lr and model.init_std count as they are."""


class HardwareConfig(Section):
    """What a cell runs on, for estimates."""

    name: str = "h100"
    """Row of the hardware table (config/hardware.py)."""
    devices: int = Field(default=1, gt=0)
    """Devices (GPUs, or processes on CPU cores) of each cell."""
    utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of the peak that cells reach; None: the hardware row's assumption."""
    usd_per_device_hour: float = Field(default=0.0, ge=0)
    """Price, for the plan."""


class BudgetConfig(Section):
    """What the whole sweep may cost; a plan beyond it is refused."""

    device_hours: float | None = Field(default=None, gt=0)
    """Estimated hours, summed over devices."""
    usd: float | None = Field(default=None, gt=0)
    """Estimated price in US dollars."""


class FitConfig(Section):
    """How laws are fitted."""

    loss: Literal["heldout", "train"] = "heldout"
    """The loss that is fitted: held-out at the end, or training loss averaged over the last tenth of the steps."""
    parameters: Literal["total", "non_embedding"] = "total"
    """What N counts. Hoffmann et al. count all parameters, Kaplan et al. leave embeddings out."""
    huber_delta: float = Field(default=1e-3, gt=0)
    """Residual of log loss beyond which a run pulls linearly instead of quadratically."""
    bootstrap: int = Field(default=200, ge=20)
    """Resamples behind every interval."""
    level: float = Field(default=0.9, gt=0, lt=1)
    """Coverage of the intervals."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resampling."""
    target_flops: float | None = Field(default=None, gt=0)
    """Compute the report recommends a run for; None: ten times the largest cell."""


class SweepConfig(Section):
    """A sweep. Cells are families x sizes x tokens x axes x seeds."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the sweep and of its directory."""
    output_dir: Path = Field(default=Path("runs/sweeps"), validate_default=False)
    """The sweep lives in output_dir/name."""
    base: dict[str, Any] = Field(min_length=1)
    """The run that all cells share, as a run file would hold it; `run: NAME` starts from a run file."""
    families: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name of a model family, and the dotted run keys that make it: `hope: {model: hope_tiny}`."""
    sizes: SizesConfig | None = None
    """Ladder of sizes; None: the families as they are."""
    design: DesignConfig = DesignConfig()
    """How long each size trains."""
    axes: dict[str, tuple[Any, ...]] = Field(default={})
    """Further axes: any dotted run key with its values, for example optim.lr."""
    seeds: tuple[int, ...] = Field(default=(), max_length=100)
    """Seeds of initial weights and data order; empty: those of the base run."""
    warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    """Warm-up as a share of each cell's steps; None: optim.warmup_steps of the base run."""
    decay_fraction: float | None = Field(default=None, ge=0, le=1)
    """Final decay of the wsd schedule as a share of each cell's steps."""
    transfer: TransferConfig | None = None
    """Scale learning rates, initial weights and logits with width; None: standard parametrization."""
    hardware: HardwareConfig = HardwareConfig()
    """What a cell runs on."""
    budget: BudgetConfig = BudgetConfig()
    """What the sweep may cost."""
    retries: int = Field(default=2, ge=0)
    """How often a failed cell is started again before it is set aside."""
    fit: FitConfig = FitConfig()
    """How laws are fitted."""
    tracking: TrackingConfig | None = None
    """Tracking of all cells, children of one parent run; None: that of the base run."""

    @property
    def directory(self) -> Path:
        """Directory of the sweep."""
        return self.output_dir / self.name

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        for key, values in self.axes.items():
            if not values or len({json.dumps(value) for value in values}) < len(values):
                raise ConfigError(f"axes: {key} needs a list of different values, not {list(values)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds={list(self.seeds)} must differ")
        return self


def load_sweep(path: str | Path) -> SweepConfig:
    """Load a sweep file; unknown keys fail and name the nearest one.

    Args:
        path: a YAML file, or the name of one in configs/sweeps.

    Raises:
        ConfigError: one line per mistake.
    """
    file = find_config(path, "sweeps")
    try:
        sweep = SweepConfig.model_validate_json(json.dumps(read_mapping(file), default=str), strict=True)
    except ValidationError as error:
        raise explain(error, SweepConfig, lambda location: str(file)) from None
    return sweep.model_copy(update={"output_dir": sweep.output_dir.expanduser().absolute()})
