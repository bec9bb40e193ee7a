"""Baselines with as many parameters as HOPE at the same size."""

from __future__ import annotations

from typing import Any

from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.model import ModelConfig

_WIDTH_MULTIPLE = 16  # of a CMS level's hidden width: divisible by tensor parallel up to 16


def matched_levels(model: ModelConfig, target: ModelConfig) -> list[dict[str, Any]]:
    """The CMS levels of `model`, scaled alike so that its parameters match those of `target`.

    Parameters are affine in the scale, so two counts determine it; widths are rounded to a multiple of 16.
    """
    levels = model.cms.levels
    total = sum(level.hidden_size for level in levels)
    per_width = (_at_scale(model, 2.0) - _at_scale(model, 1.0)) / total
    scale = 1 + (num_parameters(target) - num_parameters(model)) / (per_width * total)
    return [
        level.model_dump(exclude_defaults=True)
        | {
            "hidden_size": max(1, round(level.hidden_size * scale / _WIDTH_MULTIPLE)) * _WIDTH_MULTIPLE,
            "update_period_steps": level.update_period_steps,
        }
        for level in levels
    ]


def _at_scale(model: ModelConfig, scale: float) -> int:
    levels = tuple(
        level.model_copy(update={"hidden_size": int(level.hidden_size * scale)}) for level in model.cms.levels
    )
    return num_parameters(model.model_copy(update={"cms": model.cms.model_copy(update={"levels": levels})}))
