"""From a few sizes to the architecture that layers are built from, checked as a run file is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import nn

from hope_megatron.config.base import Section
from hope_megatron.config.messages import explain
from hope_megatron.config.model import AttentionConfig, CMSConfig, CMSLevelConfig, MemoryConfig, ModelConfig
from hope_megatron.nn.layers import architecture

SectionT = TypeVar("SectionT", bound=Section)


def checked(section: type[SectionT], where: str, **values: Any) -> SectionT:
    """A section of the configuration from keywords.

    Raises:
        ConfigError: a keyword is unknown or a value wrong; the message names `where`, the value and the remedy.
    """
    try:
        return section(**values)
    except ValidationError as error:
        raise explain(error, section, lambda _: where) from None


def cms(
    where: str, dim: int, hidden_sizes: Sequence[int] | None, update_periods: Sequence[int] | None, **settings: Any
) -> CMSConfig:
    """Levels of the continuum memory system, fastest first; one of 4 dim that is updated at every step by default."""
    hidden_sizes = (4 * dim,) if hidden_sizes is None else hidden_sizes
    periods = (1,) * len(hidden_sizes) if update_periods is None else update_periods
    if len(periods) != len(hidden_sizes):
        raise ValueError(
            f"{where} has {len(hidden_sizes)} hidden_sizes and {len(periods)} update_periods; give one of each per level"
        )
    levels = tuple(
        checked(CMSLevelConfig, where, hidden_size=size, update_period_steps=period)
        for size, period in zip(hidden_sizes, periods)
    )
    return checked(CMSConfig, where, levels=levels, **settings)


def one_layer(
    where: str,
    dim: int,
    num_heads: int = 1,
    *,
    head_dim: int | None = None,
    mixer: str = "memory",
    cms: CMSConfig | None = None,
    memory: Mapping[str, Any] | None = None,
    attention: Mapping[str, Any] | None = None,
    **settings: Any,
) -> SimpleNamespace:
    """The architecture of a layer, as `layers.py` reads it."""
    config = checked(
        ModelConfig,
        where,
        vocab_size=1,
        num_layers=1,
        hidden_size=dim,
        num_heads=num_heads,
        head_size=head_dim,
        layer_pattern=(mixer,),
        memory=checked(MemoryConfig, where, **(memory or {})),
        attention=checked(AttentionConfig, where, **(attention or {})),
        cms=cms or CMSConfig(levels=(CMSLevelConfig(hidden_size=1),)),
        **settings,
    )
    return architecture(json.loads(config.model_dump_json()))


def reset_parameters(root: nn.Module) -> None:
    """Initial values of a layer and all in it, from torch's global generator."""
    for module in root.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "init_std"):
            nn.init.normal_(module.weight, std=module.init_std)
        if hasattr(module, "reset"):
            module.reset()
