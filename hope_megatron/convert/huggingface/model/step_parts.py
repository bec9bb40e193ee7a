"""Who computes a part of a step in an exported model, in the place of runtime/step_parts.py: PyTorch, as no run was started."""

import sys
from typing import Any

_HOMES = {"short_conv": ("hope_short_conv", "convolved")}
"""Module (flat, as it travels) and function by part; a module that asks is loaded already."""


def implementation(part: str) -> Any:
    """The function that computes a part."""
    module, name = _HOMES[part]
    return getattr(sys.modules[f"{__package__}.{module}"], name)
