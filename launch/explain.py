"""Every key of a cluster file, with its type, default and meaning, out of the schema."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from pydantic_core import PydanticUndefined

from hope_megatron.config.base import Section
from launch.cluster import ClusterConfig


def explain_keys(section: type[Section] = ClusterConfig, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, meaning) of each key; those of sections inside follow their own."""
    rows = []
    for name, field in section.model_fields.items():
        default = "required" if field.default is PydanticUndefined else _text(field.default)
        meaning = " ".join((field.description or "").split())
        rows.append((prefix + name, default, meaning))
        inner = _section(field.annotation)
        if inner is not None:
            rows += explain_keys(inner, f"{prefix}{name}.")
    return rows


def explanation() -> str:
    """The keys as a page for the terminal."""
    blocks = []
    for key, default, meaning in explain_keys():
        text = textwrap.fill(meaning, 100, initial_indent="    ", subsequent_indent="    ")
        blocks.append(f"{key}  ({default})" + (f"\n{text}" if meaning else ""))
    return "\n".join(blocks)


def _text(value: Any) -> str:
    if isinstance(value, Section):
        return "a section"
    return json.dumps(value, default=str)


def _section(annotation: Any) -> type[Section] | None:
    """The section behind `Section` or `Section | None`."""
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None
