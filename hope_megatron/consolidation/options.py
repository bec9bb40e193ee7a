"""What may be chosen about a night, and the run that it is. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hope_megatron.config import RunConfig, resolve_run_config
from hope_megatron.config.model import CMSConfig
from hope_megatron.consolidation.errors import ConsolidationError

_PASSES = 8  # times that a row is replayed where the number of steps is not given
_LEVEL = re.compile(r"([1-9]\d*)(?::([1-9]\d*))?")


@dataclass(frozen=True)
class NightOptions:
    """Of `hope consolidate`, and of `hope_megatron.consolidate`."""

    wake: tuple[Path, ...]
    """Text files that are read by day, in their order."""
    unseen: tuple[Path, ...] = ()
    """Text files that are only asked about: documents like those, which the model does not read."""
    general: tuple[Path, ...] = ()
    """Text files whose answers are kept as they were; none: the run's training data."""
    replay: int = 512
    """Rows that the replay buffer holds at most."""
    reservoir: float = 0.25
    """Share of the buffer for a uniform sample of what was not among the most surprising."""
    priority: float = 1.0
    """Rows are replayed in proportion to surprise to this power; 0: all alike, and the buffer does not look at surprise."""
    dreams: int = 0
    """Rows that the adapted model makes up itself."""
    general_share: float = 0.5
    """Share of general text in every batch."""
    draws: int = 16
    """Answers of the teacher that are kept for every token."""
    levels: tuple[str, ...] = ()
    """CMS levels that learn, 1 the fastest, with their update period in steps, `2:4`; none: the next slower than what adapts."""
    steps: int | None = None
    seed: int = 0

    def check(self) -> None:
        """
        Raises:
            ConsolidationError: in one line.
        """
        if not self.wake:
            raise ConsolidationError("no text to read: give --wake FILE ...")
        for path in (*self.wake, *self.unseen, *self.general):
            if not path.is_file():
                raise ConsolidationError(f"no file {path}; name UTF-8 text files")
        for name, least in {"replay": 1, "dreams": 0, "draws": 1, "steps": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConsolidationError(f"--{name} {value} must be at least {least}")
        for name in ("reservoir", "general_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConsolidationError(f"--{name.replace('_', '-')} {getattr(self, name)} must be from 0 to below 1")
        if self.priority < 0:
            raise ConsolidationError(f"--priority {self.priority} must not be negative")

    @property
    def of_replay(self) -> dict[str, Any]:
        """What the kept rows depend on, beside files and weights; JSON values."""
        names = ("replay", "reservoir", "priority", "dreams", "general_share", "draws", "seed")
        return {name: value for name, value in asdict(self).items() if name in names}


def learning_levels(cms: CMSConfig, named: Sequence[str]) -> dict[int, int]:
    """Update period in night steps by level, from 0: those named, else the next slower than what adapts in a context.

    Levels without a period of their own keep theirs in proportion, the fastest of them changing at every step.

    Raises:
        ConsolidationError: no such level.
    """
    ticking = [i for i, level in enumerate(cms.levels) if level.ticks]
    names = list(named) or [str(min(len(cms.levels), max(ticking, default=-1) + 2))]
    found: dict[int, int | None] = {}
    for name in names:
        match = _LEVEL.fullmatch(name)
        if match is None or int(match[1]) > len(cms.levels):
            raise ConsolidationError(
                f"--levels {name}: give levels from 1 (fastest) to {len(cms.levels)}, with a period in steps if you like: 2:4"
            )
        found[int(match[1]) - 1] = int(match[2]) if match[2] else None
    fastest = cms.levels[min(found)].update_period_steps
    return {i: period or max(1, cms.levels[i].update_period_steps // fastest) for i, period in sorted(found.items())}


def night_config(
    base: RunConfig, name: str, options: NightOptions, num_rows: int, overrides: Sequence[str] = ()
) -> RunConfig:
    """The run of a night: the base's model, data and layout; AdamW on the levels that learn.

    Args:
        num_rows: rows of the day.
        overrides: changes to it, `optim.lr=3e-4`.

    Raises:
        ConsolidationError, ConfigError: in one line.
    """
    levels = learning_levels(base.model.cms, options.levels)
    batch = base.training.global_batch_size
    rows = min(num_rows, options.replay) + options.dreams
    steps = options.steps or max(1, round(_PASSES * rows / batch / (1 - options.general_share)))
    data = base.model_dump(mode="json")
    for i, level in enumerate(data["model"]["cms"]["levels"]):
        level["update_period_steps"] = levels.get(i, level["update_period_steps"])
        level |= {"update_period_changes": [], "update_period_adaptive": None}
    data["name"] = name
    data["training"] |= {"steps": steps, "eval_every": 0, "ema": 0.0, "log_every": max(1, steps // 20)}
    data["optim"] = {
        "name": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "warmup_steps": steps // 10,
        "trainable": [f"layers.*.mlp.levels.{i}.*" for i in levels],
    }
    data["checkpoint"] = {"every": max(1, steps // 4)}
    return resolve_run_config(data, overrides, source=f"the night of {base.name}")


def night_name(base: str) -> str:
    """NAME-night-1 after NAME, NAME-night-2 after that."""
    match = re.fullmatch(r"(.*)-night-(\d+)", base)
    return f"{match[1]}-night-{int(match[2]) + 1}" if match else f"{base}-night-1"
