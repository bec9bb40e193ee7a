"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Any

import torch

from hope_megatron.optim.errors import OptimError

SCHEDULES = ("cosine", "constant", "linear", "wsd")


def lr_at(step: int, cfg: Any) -> float:
    """Multiplier of the peak learning rate, in [0, 1], for optimizer step `step` (0 is the first).

    cfg has `schedule`, `warmup_steps`, `total_steps`, `min_lr_ratio` and, for 'wsd', `decay_steps`. Warm-up is linear
    and ends at 1 with step `warmup_steps - 1`. Then 'constant' stays; 'cosine' and 'linear' fall to `min_lr_ratio` at
    the last step, `total_steps - 1`; 'wsd' (warm-up, stable, decay) stays at 1 and falls linearly over the last
    `decay_steps`. Later steps keep the final value.
    """
    if cfg.schedule not in SCHEDULES:
        raise OptimError(f"schedule {cfg.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return 1.0
    decay_start = cfg.total_steps - cfg.decay_steps if cfg.schedule == "wsd" else cfg.warmup_steps
    last = cfg.total_steps - 1
    progress = min(1.0, max(0.0, (step + 1 - decay_start) / max(1, last + 1 - decay_start)))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if cfg.schedule == "cosine" else 1.0 - progress
    return cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * shape


def apply_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set every group's `lr` to its `base_lr` times the multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * multiplier
