"""The settings that every family of a suite tries: the same number for each, of the same kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.models import changed
from hope_megatron.suites.selection import Setting
from hope_megatron.suites.suite import SuiteOptions

USUAL_RATE = {"adamw": 3e-3, "m3": 1e-2, "muon": 1e-2}
BOTH = (("adamw", 3e-3), ("m3", 1e-2))
_OTHER_RATES = (1 / 3, 3.0, 1 / 9, 9.0)  # times a grid's rate

# How the memories of a family start. Bounds of a family's own rule are never raised. Which one a task needs is not known before:
# counting modulo a number wants old writes to be gone soon, counting without bound wants writes that add up and stay.
STARTS: Mapping[str, Mapping[str, float]] = {
    "own": {},
    "forgetting": {"eta_init": 0.5, "alpha_init": 0.9},
    "adding": {"eta_factor": 0.01, "eta_init": 0.5, "alpha_init": 0.9999},
    "keeping": {"alpha_init": 0.99999, "input_scale": 0.3},
}


def started(model: ModelConfig, start: str) -> ModelConfig:
    """A family's model with its memories started in one of the `STARTS`; what its rule does not have is left out.

    A family of softmax attention, or one whose rates and retention are fixed, stays what it is.
    """
    wanted, memory = STARTS[start], model.memory
    if "memory" not in model.layer_pattern:
        return model
    changes: dict[str, Any] = {}
    if memory.eta == "data":
        changes |= {key: wanted[key] for key in ("eta_init",) if key in wanted}
        if "eta_factor" in wanted:
            changes["eta_max"] = wanted["eta_factor"] * memory.eta_max
    if memory.decay in ("data", "constant") and "alpha_init" in wanted:
        changes["alpha_init"] = wanted["alpha_init"]
    if memory.num_layers == 2 and "input_scale" in wanted:
        changes["input_scale"] = wanted["input_scale"]
    return changed(model, {"memory": changes}) if changes else model


def settings_of(
    model: ModelConfig, options: SuiteOptions, starts: tuple[str, ...], rates: tuple[tuple[str, float], ...]
) -> list[Setting]:
    """The grid of one family: every start with every (optimizer, learning rate).

    Where a start changes nothing in a family, it tries another learning rate of the same optimizer instead, so that all
    families have as many tries.

    Args:
        model: the family's own settings.
        options: `optimizer` and `lr` replace the grid's; `quick` leaves one entry.
        starts: names of `STARTS`.
        rates: pairs of optimizer and learning rate.
    """
    if options.quick:
        starts, rates = starts[:1], rates[:1]
    found: list[Setting] = []
    for optimizer, lr in _wanted(rates, options):
        models: list[ModelConfig] = []
        others = iter(_OTHER_RATES)
        for start in starts:
            if (this := started(model, start)) in models:
                rate = lr * next(others)
                found.append(Setting(f"{optimizer} {rate:.2g}", optimizer, rate))
            else:
                models.append(this)
                name = f"{optimizer} {lr:.2g}" + (f", {start}" if len(starts) > 1 else "")
                found.append(Setting(name, optimizer, lr, start))
    return found


def _wanted(rates: tuple[tuple[str, float], ...], options: SuiteOptions) -> list[tuple[str, float]]:
    """The grid's rates, or what --optimizer and --lr say."""
    optimizers = [options.optimizer] if options.optimizer else list(dict.fromkeys(name for name, _ in rates))
    if options.lr is not None:
        return [(name, options.lr) for name in optimizers]
    return [pair for pair in rates if pair[0] in optimizers] or [(name, USUAL_RATE[name]) for name in optimizers]
