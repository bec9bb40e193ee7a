"""Parameter groups: one per role, update period and weight decay, in a fixed order with speaking names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hope_megatron.optim.errors import OptimError
from hope_megatron.optim.tags import ParamTags, read_tags
from hope_megatron.optim.zero import shard_shape


def build_param_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], optim_cfg: Any) -> list[dict[str, Any]]:
    """Groups for an optimizer of this package: 'matrix', 'vector', 'vector/no_decay', 'matrix/period_8', ...

    Every group has `name`, `role`, `update_period_steps` and its changes, `weight_decay`, `lr` and `base_lr` (the rate before the
    schedule). Inside a group parameters keep the order of the model; groups are sorted by role, period, decay and changes. Each
    parameter gets its name as the attribute `optim_name`. Parameters without requires_grad are left out; shared ones
    count once.
    """
    found: dict[tuple[Any, ...], tuple[ParamTags, list[nn.Parameter]]] = {}
    seen: set[int] = set()
    for name, param in named_parameters:
        if not param.requires_grad or id(param) in seen:
            continue
        seen.add(id(param))
        param.optim_name = name  # type: ignore[attr-defined]
        tags = read_tags(param, name, shard_shape(param))
        decays, changes, level = tags.weight_decay, tags.update_period_changes, tags.adaptive_level
        order = (tags.role, tags.update_period_steps, not decays, changes, level)
        found.setdefault(order, (tags, []))[1].append(param)
    if not found:
        raise OptimError("no parameter to train: every parameter has requires_grad=False")
    return [_group(*found[order], optim_cfg) for order in sorted(found)]


def _group(tags: ParamTags, params: list[nn.Parameter], cfg: Any) -> dict[str, Any]:
    """The group of parameters that have these tags."""
    lr = cfg.vector_lr if tags.role == "vector" and cfg.vector_lr is not None else cfg.lr
    return {
        "params": params,
        "name": tags.group_name,
        "role": tags.role,
        "update_period_steps": tags.update_period_steps,
        "update_period_changes": tags.update_period_changes,
        "adaptive_level": tags.adaptive_level,
        "weight_decay": cfg.weight_decay if tags.weight_decay else 0.0,
        "lr": lr,
        "base_lr": lr,
    }
