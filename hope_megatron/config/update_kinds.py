"""Which optimizer steps of a run differ in what they do, and how often each comes."""

from __future__ import annotations

import math

from hope_megatron.config.clock import UpdateClock
from hope_megatron.config.run import RunConfig


def update_kinds(config: RunConfig) -> list[tuple[int, float]]:
    """(number of a step, share of all steps like it): steps differ in the levels whose clocks tick and, in M3's literal form, in
    the slow momentum."""
    clocks = {level.clock for level in config.model.cms.levels}
    if any(clock.changes for clock in clocks):
        return _changing_kinds(config, clocks)
    periods = {clock.first for clock in clocks}
    if config.optim.name == "m3" and not (config.optim.stagger and config.optim.form == "ema"):
        periods.add(config.optim.slow_period_steps)
    cycle = math.lcm(*periods)
    found: dict[tuple[int, ...], list[int]] = {}
    for step in range(1, min(cycle, 10_000) + 1):
        found.setdefault(tuple(p for p in sorted(periods) if step % p == 0), []).append(step)
    total = sum(map(len, found.values()))
    return [(steps[0] + cycle, len(steps) / total) for steps in found.values()]


def _changing_kinds(config: RunConfig, clocks: set[UpdateClock]) -> list[tuple[int, float]]:
    """The same over the steps of the run: its last step of every kind."""
    last, slow = min(config.training.steps, 100_000), config.optim.slow_period_steps
    literal = config.optim.name == "m3" and not (config.optim.stagger and config.optim.form == "ema")
    ordered = sorted(clocks, key=lambda clock: (clock.first, clock.changes))
    found: dict[tuple[bool, ...], list[int]] = {}
    for step in range(1, last + 1):
        found.setdefault((*(clock.due(step) for clock in ordered), literal and step % slow == 0), []).append(step)
    return [(steps[-1], len(steps) / last) for steps in found.values()]
