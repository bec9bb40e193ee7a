"""Whether a checkpoint belongs to the model that is to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from hope_megatron.checkpoint.format import Checkpoint, CheckpointError
from hope_megatron.config.model import ModelConfig

_OF_CLOCKS = re.compile(r"\.update_period_(steps$|changes(\.|$)|adaptive(\.|$))")


def check_same_model(checkpoint: Checkpoint, model: Mapping[str, Any], *, periods: bool = True) -> None:
    """Refuse a checkpoint of another architecture.

    Args:
        periods: the update periods of levels have to be the same, too; weights alone do not depend on them.

    Raises:
        CheckpointError: listing the keys that differ.
    """
    there, here = _flatten(_completed(checkpoint.config["model"])), _flatten(model)
    keys = [key for key in sorted({*there, *here}) if key != "name" and there.get(key) != here.get(key)]
    keys = [key for key in keys if periods or not _OF_CLOCKS.search(key)]
    if keys:
        lines = [f"model.{key}: {there.get(key)!r} in the checkpoint, {here.get(key)!r} in this run" for key in keys]
        raise CheckpointError(
            f"{checkpoint.path} belongs to another model:\n  " + "\n  ".join(lines) + "\n"
            "Use the configuration it was written with, or give this run another name."
        )


def _completed(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved configuration with the defaults of fields that did not exist then; as it stands if this version knows less."""
    try:
        return ModelConfig.model_validate_json(json.dumps(model), strict=True).model_dump(mode="json")
    except ValidationError:
        return model


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists by dotted key."""
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat
