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
    entry, kind, named_parameters = OPTIMIZERS[cfg.name], OPTIMIZERS.open(cfg.name), list(named_parameters)
    settings = {name: getattr(cfg, name) for name in entry.settings}
    if kind.orthogonalizes:
        dtype = newton_schulz_dtype(cfg.ns_dtype, device_type(named_parameters))
        settings["ns"] = NewtonSchulz(cfg.ns_steps, cfg.ns_coefficients, dtype)
    return kind(build_param_groups(named_parameters, cfg), **settings)


def newton_schulz_dtype(name: str, device: str) -> torch.dtype:
    """The dtype that `optim.ns_dtype` means on a type of device."""
    if name == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def device_type(named_parameters: list[tuple[str, nn.Parameter]]) -> str:
    """Where the parameters are."""
    return named_parameters[0][1].device.type if named_parameters else "cpu"
