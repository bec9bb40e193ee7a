"""From a configuration to an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hope_megatron.config.optimizers import OPTIMIZERS
from hope_megatron.optim.base import BoundOptimizer
from hope_megatron.optim.exchange import NewtonSchulz
from hope_megatron.optim.groups import build_param_groups


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], cfg: Any) -> BoundOptimizer:
    """The optimizer that `cfg.name` names, over the groups of `build_param_groups`.

    cfg: an object with the fields of `hope_megatron.config.optim.OptimConfig`. Build it before `deepspeed.initialize`
    and pass it there as `optimizer`; afterwards call `bind_zero(engine.optimizer, ...)`.
    """
    entry, kind = OPTIMIZERS[cfg.name], OPTIMIZERS.open(cfg.name)
    settings = {name: getattr(cfg, name) for name in entry.settings}
    if kind.orthogonalizes:
        settings["ns"] = NewtonSchulz(cfg.ns_steps, cfg.ns_coefficients, getattr(torch, cfg.ns_dtype))
    return kind(build_param_groups(named_parameters, cfg), **settings)
