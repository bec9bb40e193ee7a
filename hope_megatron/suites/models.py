"""Small models of every family with as many parameters as HOPE at the same size."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.families import matched_levels
from hope_megatron.config.load import change_model, override_model, read_mapping
from hope_megatron.config.model import CMSConfig, CMSLevelConfig, ModelConfig
from hope_megatron.config.presets import config_names, find_config
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.suite import HOPES

# The two families that configs/families has no file for: the one it starts from, and the one that is a preset.
_BUILT_IN: dict[str, dict[str, Any]] = {
    "hope": {},
    "transformer_pp": {"layer_pattern": ["attention"], "cms": {"levels": [{"hidden_size": 64}]}},
}
LIKE = {
    "linear_attention": "Linear-attention-like: without that paper's feature map",
    "memora": "Memora-like: SiLU and no layer norm in its MLP",
    "retnet": "RetNet-like: without that paper's rotation of queries and keys, and its output gate",
    "rwkv7": "RWKV-7-like: its state, in this operator's layer",
    "samba": "Samba-like: a gated linear recurrence in the place of that paper's Mamba layers",
    "ttt_linear": "TTT-Linear-like: without that paper's layer norm",
    "ttt_mlp": "TTT-MLP-like: without that paper's layer norm",
}
"""Families that lack a part of their paper's formulas, and which. Tables of them say so."""
_FAST_CHUNK = 64  # tokens, where the length of a chunk changes nothing but the speed
_SHORT_SEGMENTS = {"segment_tokens": 16, "memory_tokens": 4}  # the suites' sequences have some tens of tokens
DEFAULT_FAMILIES = ("hope", "titans", "deltanet", "gated_deltanet", "retnet", "transformer_pp")


def family_choices() -> list[str]:
    """Every family there is."""
    return [*_BUILT_IN, *config_names("families")]


def check_families(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, if all are families.

    Raises:
        SuiteError: names the nearest family.
    """
    known = family_choices()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise SuiteError(f"no family {name!r}; {hint}Known: {', '.join(known)}")
    return names


def small_hope(vocab_size: int, *, width: int, layers: int, heads: int, chunk_tokens: int) -> ModelConfig:
    """HOPE with two CMS levels as wide as the model, of which the second changes every 4 steps (as in `hope_tiny`).

    Args:
        vocab_size: padded to a multiple of 16.
        width: model width D.
        layers: layers.
        heads: heads of D / heads.
        chunk_tokens: tokens whose inner gradients are taken at one state.
    """
    levels = (CMSLevelConfig(hidden_size=width), CMSLevelConfig(hidden_size=width, update_period_steps=4))
    base = ModelConfig(
        name="hope",
        vocab_size=vocab_size,
        vocab_multiple=16,
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        cms=CMSConfig(levels=levels),
    )
    return changed(base, {"memory": {"chunk_tokens": chunk_tokens}})


def family_model(family: str, hope: ModelConfig) -> ModelConfig:
    """A family at the size of `hope`: its settings, HOPE's chunk length, CMS widths that match the parameters.

    Inner rates on L2 are bounded, the longer the chunk the lower; a family's rate stays the same share of its bound. A memory that
    computes the same at every chunk length gets a longer one, which is faster.
    """
    check_families((family,))
    if family == "hope":
        return hope
    settings, source = _BUILT_IN.get(family), family
    if settings is None:
        file = find_config(family, "families")
        settings, source = read_mapping(file), str(file)
    chunk = hope.memory.chunk_tokens
    model = change_model(change_model(hope, settings, source), {"name": family}, source)
    given = model.memory.model_fields_set
    if model.memory.chunk_tokens != chunk:
        changes: dict[str, Any] = {"chunk_tokens": chunk}
        own, here = model.memory.largest_stable_eta, _largest_rate(model, chunk)
        if "eta_max" in given and math.isfinite(own):
            changes["eta_max"] = model.memory.eta_max * here / own
        model = changed(model, {"memory": changes})
    if model.memory.any_chunk:
        model = changed(model, {"memory": {"chunk_tokens": max(chunk, _FAST_CHUNK)}})
    if model.attention.segment_tokens:
        model = changed(model, {"attention": _SHORT_SEGMENTS})
    return matched(model, hope)


def _largest_rate(model: ModelConfig, chunk: int) -> float:
    return changed(model, {"memory": {"chunk_tokens": chunk, "eta_max": 0.0}}).memory.largest_stable_eta


def suite_model(family: str, hope: ModelConfig, hope_settings: tuple[str, ...]) -> ModelConfig:
    """As `family_model`; a HOPE with settings of its own, at the parameters of `hope`."""
    model = family_model(family, hope)
    if family in HOPES and hope_settings:
        return matched(override_model(model, hope_settings), hope)
    return model


def matched(model: ModelConfig, target: ModelConfig) -> ModelConfig:
    """The model with CMS widths that give it as many parameters as `target`, to within one unit of width.

    `matched_levels` rounds to what tensor parallelism divides, too coarse at this size; the fastest level takes up the rest.
    """
    model = changed(model, {"cms": {"levels": matched_levels(model, target)}})
    wider = _first_level(model, 1)
    per_unit = num_parameters(wider) - num_parameters(model)
    return _first_level(model, round((num_parameters(target) - num_parameters(model)) / per_unit))


def _first_level(model: ModelConfig, units: int) -> ModelConfig:
    """The fastest level wider by some units."""
    first, *rest = model.model_dump()["cms"]["levels"]
    levels = [{**first, "hidden_size": max(1, first["hidden_size"] + units)}, *rest]
    return changed(model, {"cms": {"levels": levels}})


def same_model(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether a configuration out of a record is today's: fields that did not exist then have their defaults."""
    try:
        completed = ModelConfig.model_validate_json(json.dumps(stored), strict=True)
    except (ValueError, TypeError):
        return False
    return completed.model_dump(mode="json") == ours


def changed(model: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """The model with nested changes, validated: mappings merge, everything else replaces."""
    return change_model(model, changes, "this suite")
