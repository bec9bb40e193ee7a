"""An input file, and what is left out: what sources on this machine and in stores have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import SourceError
from data_pipeline.formats import KNOWN, refusal

NAMES_KEPT = 5  # names shown of the files left out for one reason
REASONS_KEPT = 24  # further kinds of files are counted together


@dataclass(frozen=True)
class SourceFile:
    """One input file. ``name`` is what provenance records; ``size`` is in bytes, None when the store does not say."""

    path: str
    name: str
    size: int | None = None
    modified: str = ""

    @property
    def is_remote(self) -> bool:
        return "://" in self.path


@dataclass
class LeftOut:
    """Files that are not read, by reason: how many, and the first names of each."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        if reason not in self.counts and len(self.counts) >= REASONS_KEPT:
            reason = "other kinds"
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMES_KEPT:
            names.append(name)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """``2 kind .bin (a.bin, b.bin), 1 named pipe (p.txt)``"""
        return ", ".join(f"{count:,} {reason} ({self.examples(reason)})" for reason, count in self.counts.items())

    def examples(self, reason: str) -> str:
        names = self.names[reason]
        return ", ".join(names) + (", ..." if self.counts[reason] > len(names) else "")

    def to_dict(self) -> dict[str, Any]:
        return {reason: {"files": count, "names": self.names[reason]} for reason, count in self.counts.items()}


def refuse_unreadable_kind(path: str) -> None:
    """Raise SourceError for archives, tables and other kinds that are not read; any other unknown kind is taken as text."""
    if refused := refusal(path):
        suffix, advice = refused
        raise SourceError(f"{path}: files of kind {suffix} are not read. {advice}; these are read: {KNOWN}.")
