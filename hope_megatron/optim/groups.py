"""Parameter groups: one per role, update period and weight decay, in a fixed order with speaking names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hope_megatron.config.clock import Changes
from hope_megatron.optim.errors import OptimError
from hope_megatron.optim.tags import read_tags
from hope_megatron.optim.zero import shard_shape


def build_param_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], optim_cfg: Any) -> list[dict[str, Any]]:
    """Groups for an optimizer of this package: 'matrix', 'vector', 'vector/no_decay', 'matrix/period_8', ...

    Every group has `name`, `role`, `update_period_steps` and its changes, `weight_decay`, `lr` and `base_lr` (the rate before the
    schedule). Inside a group parameters keep the order of the model; groups are sorted by role, period, decay and changes. Each
    parameter gets its name as the attribute `optim_name`. Parameters without requires_grad are left out; shared ones
    count once.
    """
    found: dict[tuple[str, int, bool, Changes, int], list[nn.Parameter]] = {}
    names: dict[tuple[str, int, bool, Changes, int], str] = {}
    seen: set[int] = set()
    for name, param in named_parameters:
        if not param.requires_grad or id(param) in seen:
            continue
        seen.add(id(param))
        param.optim_name = name  # type: ignore[attr-defined]
        tags = read_tags(param, name, shard_shape(param))
        key = (
            tags.role,
            tags.update_period_steps,
            not tags.weight_decay,
            tags.update_period_changes,
            tags.adaptive_level,
        )
        found.setdefault(key, []).append(param)
        names[key] = tags.group_name
    if not found:
        raise OptimError("no parameter to train: every parameter has requires_grad=False")
    return [
        _group(names[key], *key, params, optim_cfg) for key, params in sorted(found.items(), key=lambda item: item[0])
    ]


def _group(
    name: str,
    role: str,
    period: int,
    no_decay: bool,
    changes: Changes,
    level: int,
    params: list[nn.Parameter],
    cfg: Any,
) -> dict[str, Any]:
    lr = cfg.vector_lr if role == "vector" and cfg.vector_lr is not None else cfg.lr
    return {
        "params": params,
        "name": name,
        "role": role,
        "update_period_steps": period,
        "update_period_changes": changes,
        "adaptive_level": level,
        "weight_decay": 0.0 if no_decay else cfg.weight_decay,
        "lr": lr,
        "base_lr": lr,
    }
