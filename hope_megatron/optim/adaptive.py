"""Experiment: a level's update period follows how far its gradients agree from one update to the next.

At an update of an adaptive level the gathered gradient G of its matrices is compared with their momentum M before it:

    agreement = <G, M> / (|G| |M|)        above `halve_above` the period is halved, below `double_below` it is doubled

Gradients that agree are signal, and worth acting on sooner; those that do not are noise, and are gathered for longer. The decision
is made from sums over all ranks, so that all make it alike, and written down as one more change of the period: the clock stays a
function of the step and of that list, which checkpoints carry. **choice**: the paper names no rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.distributed as dist

from hope_megatron.config.levels import AdaptivePeriod
from hope_megatron.optim.base import BoundOptimizer, group_clock


def next_period(period: int, agreement: float, rule: AdaptivePeriod) -> int:
    """The period after an update."""
    if agreement > rule.halve_above:
        return max(rule.shortest, period // 2)
    return min(rule.longest, 2 * period) if agreement < rule.double_below else period


def adapt_periods(optimizer: BoundOptimizer, rules: Mapping[int, AdaptivePeriod]) -> dict[str, float]:
    """After an optimizer step: choose the next period of every adaptive level that it has updated. Collective.

    Args:
        rules: by number of the level, as in the groups' `adaptive_level`.

    Returns:
        Metrics `cms/agreement/level_N` and `cms/update_period/level_N` of the levels updated; empty where none was.
    """
    found: dict[str, float] = {}
    bound_vectors = optimizer.bound_vectors()
    for level, rule in rules.items():
        groups = {group["name"]: group for group in optimizer.param_groups if group["adaptive_level"] == level}
        vectors = [bound for bound in bound_vectors if bound.group_name in groups]
        step = max(int(optimizer.state[bound.tensor]["step"]) for bound in vectors)
        clock = group_clock(next(iter(groups.values())))
        if not clock.due(step):
            continue
        sums = vectors[0].tensor.new_zeros(3)
        for bound in vectors:
            sums, bound.agreement = sums if bound.agreement is None else sums + bound.agreement, None
        if dist.is_initialized():
            dist.all_reduce(sums)  # replicas count alike in all three
        dot, gradient, momentum = sums.tolist()
        if not gradient * momentum > 0:  # a first update, with no momentum before it
            continue
        agreement = dot / math.sqrt(gradient * momentum)
        period = clock.period(step)
        following = next_period(period, agreement, rule)
        if following != period:
            for group in groups.values():
                group["update_period_changes"] = (*group["update_period_changes"], (step, following))
        found |= {f"cms/agreement/level_{level}": agreement, f"cms/update_period/level_{level}": float(following)}
    return found
