"""A line of `hope doctor`."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, WARNING, MISSING = "ok", "note", "warning", "missing"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    status: str
    text: str
    advice: str = ""
