"""Efficiencies that a real run reached, in the place of assumed ones."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hope_megatron.config.base import ConfigError
from hope_megatron.config.efficiency import DEFAULT, Efficiency, calibrated
from hope_megatron.config.hardware import Hardware
from hope_megatron.config.run import RunConfig
from hope_megatron.config.step_time import step_time
from hope_megatron.runtime.files import write_text

_NETWORK = ("link", "network", "collective_s", "collective_between_s", "host_link")
_LARGEST_FACTOR = 20.0


def measured_step_s(records: Iterable[Mapping[str, Any]], config: RunConfig) -> float:
    """Median seconds of a step, from the records of a run; the first one holds its start.

    Raises:
        ConfigError: if there are too few.
    """
    rates = [r["speed/tokens_per_s"] for r in records if r.get("speed/tokens_per_s", 0) > 0][1:]
    if len(rates) < 3:
        raise ConfigError(
            f"{len(rates)} records of speed after the first one: a calibration wants at least 3; let it run longer"
        )
    return config.training.tokens_per_step / statistics.median(rates)


def calibrate(config: RunConfig, world_size: int, hardware: Hardware, step_s: float) -> dict[str, float]:
    """Assumptions about the device, all slower or faster by one factor, so that the plan's step takes `step_s`.

    One number cannot tell products from bytes or launches; those of the network stay as assumed.
    """
    low, high = 1 / _LARGEST_FACTOR, _LARGEST_FACTOR
    for _ in range(60):
        middle = (low * high) ** 0.5
        slow = step_time(config, world_size, hardware, calibrated(_scaled(middle), "")).seconds > step_s
        low, high = (low, middle) if slow else (middle, high)
    return _scaled((low * high) ** 0.5)


def write_efficiency(path: Path, values: dict[str, float], source: str) -> None:
    """Keep calibrated values for a cluster."""
    write_text(path, json.dumps({"source": source, "values": values}, indent=1) + "\n")


def read_efficiency(path: Path) -> Efficiency:
    """What `write_efficiency` wrote.

    Raises:
        ConfigError: if the file is not one of those.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return calibrated({str(name): float(x) for name, x in content["values"].items()}, str(content["source"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} has no efficiencies ({error}); hope plan --calibrate RUN --out FILE writes them"
        ) from error


def _scaled(factor: float) -> dict[str, float]:
    found = {}
    for field in fields(Efficiency):
        if field.name not in _NETWORK:
            value = getattr(DEFAULT, field.name).expected
            found[field.name] = value * factor if field.name.endswith("_s") else min(1.0, value / factor)
    return found
