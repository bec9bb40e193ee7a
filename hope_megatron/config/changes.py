"""What a run was set to differently over its steps: found when it is resumed, kept in its history.

An entry of the history is `{"operation": "settings", "step": N, "changes": {"optim.lr": [before, after]}}`: from step N + 1 on the
run had the second value. Checkpoints carry the history of their own weights in `checkpoint.json`, beside the conversions that
they went through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SETTINGS = "settings"

Changes = dict[str, list[Any]]
"""Dotted key -> [value before, value after]; None where there was no such key."""


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings and lists by dotted key: `{"optim.betas.0": 0.9}`. Empty ones are values."""
    items = tree if isinstance(tree, Mapping) else dict(enumerate(tree)) if isinstance(tree, (list, tuple)) else {}
    if not items:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, value in items.items():
        flat |= leaves(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """Keys whose values differ, in the order of `after`, then those that are gone."""
    old, new = leaves(before), leaves(after)
    return {key: [old.get(key), new.get(key)] for key in (new | old) if old.get(key) != new.get(key)}


def settings_entry(step: int, changes: Changes) -> dict[str, Any]:
    """An entry of the history."""
    return {"operation": SETTINGS, "step": step, "changes": changes}


def settings_changes(history: Iterable[Mapping[str, Any]]) -> list[tuple[int, Changes]]:
    """(step, changes) of the entries that are about settings."""
    return [(entry["step"], entry["changes"]) for entry in history if entry.get("operation") == SETTINGS]


def describe_changes(changes: Changes) -> str:
    """`optim.lr 0.001 -> 0.05, training.steps 6 -> 12`."""
    return ", ".join(f"{key} {_shown(before)} -> {_shown(after)}" for key, (before, after) in changes.items())


def describe_entry(entry: Mapping[str, Any]) -> str:
    """One line for any entry of a history."""
    if entry.get("operation") == SETTINGS:
        return f"from step {entry['step'] + 1:,} on: {describe_changes(entry['changes'])}"
    return f"made by {entry['operation']} of {entry['source']}"


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
    return text if len(text) <= 80 else text[:77] + "..."
