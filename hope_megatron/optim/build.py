"""From a configuration to an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hope_megatron.optim.base import BoundOptimizer
from hope_megatron.optim.elementwise import SGD, AdamW
from hope_megatron.optim.errors import OptimError
from hope_megatron.optim.exchange import NewtonSchulz
from hope_megatron.optim.groups import build_param_groups
from hope_megatron.optim.m3 import M3
from hope_megatron.optim.muon import AdaMuon, Muon

OPTIMIZERS = ("m3", "muon", "adamuon", "adamw", "sgd")


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], cfg: Any) -> BoundOptimizer:
    """The optimizer that `cfg.name` names, over the groups of `build_param_groups`.

    cfg: an object with the fields of `hope_megatron.config.optim.OptimConfig`. Build it before `deepspeed.initialize`
    and pass it there as `optimizer`; afterwards call `bind_zero(engine.optimizer, ...)`.
    """
    groups = build_param_groups(named_parameters, cfg)
    adam = {"betas": tuple(cfg.betas), "eps": cfg.eps}
    ns = NewtonSchulz(cfg.ns_steps, cfg.ns_coefficients, getattr(torch, cfg.ns_dtype))
    if cfg.name == "m3":
        return M3(
            groups,
            **adam,
            ns=ns,
            form=cfg.form,
            slow_beta=cfg.slow_beta,
            slow_period_steps=cfg.slow_period_steps,
            slow_weight=cfg.slow_weight,
            denominator_floor=cfg.denominator_floor,
            stagger=cfg.stagger,
        )
    if cfg.name in ("muon", "adamuon"):
        kind = Muon if cfg.name == "muon" else AdaMuon
        return kind(groups, **adam, ns=ns, momentum=cfg.momentum, nesterov=cfg.nesterov)
    if cfg.name == "adamw":
        return AdamW(groups, **adam)
    if cfg.name == "sgd":
        return SGD(groups, momentum=cfg.momentum, nesterov=cfg.nesterov)
    raise OptimError(f"optimizer {cfg.name!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
