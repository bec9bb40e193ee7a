"""Learning rates across width (muP, arXiv 2203.03466): parameter groups by how a parameter's fan-in grows."""

from __future__ import annotations

import math
from typing import Any

from hope_megatron.optim import BoundOptimizer


def scale_learning_rates(optimizer: BoundOptimizer, width_multiplier: float) -> None:
    """Give parameters whose fan-in grows with the width (`width_fan_in`) groups and learning rates of their own.

    Before DeepSpeed takes the optimizer. A unit of learning rate moves a matrix's output by about its fan-in under AdamW
    (entries of one sign add up), by its root under orthogonalised updates of fixed RMS. Decoupled decay is lr times
    weight_decay, which stays what it is at the base width.

    Args:
        optimizer: as built; its groups are replaced.
        width_multiplier: width over base width; 1 leaves everything as it is.
    """
    if width_multiplier == 1.0:
        return
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        wide = [param for param in group["params"] if getattr(param, "width_fan_in", False)]
        rest = [param for param in group["params"] if not getattr(param, "width_fan_in", False)]
        scale = 1 / width_multiplier
        if group["role"] == "matrix" and optimizer.orthogonalizes:
            scale = math.sqrt(scale)
        if rest:
            groups.append({**group, "params": rest})
        if wide:
            scaled = {"lr": group["lr"] * scale, "base_lr": group["base_lr"] * scale}
            decay = group["weight_decay"] / scale
            groups.append({**group, **scaled, "weight_decay": decay, "params": wide, "name": f"{group['name']}/width"})
    optimizer.param_groups[:] = groups
