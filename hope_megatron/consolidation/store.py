"""What a day has left, beside the run of its night: rows in replay.safetensors; where they came from in replay.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from hope_megatron.consolidation.errors import ConsolidationError
from hope_megatron.consolidation.night import NightSource, Rows
from hope_megatron.runtime.files import file_sha256, replacing, write_json

_TENSORS, _ABOUT = "replay.safetensors", "replay.json"
_KINDS = ("replay", "dreams", "general")
_PARTS = ("inputs", "draws", "surprise")


@dataclass(frozen=True)
class Day:
    """Rows by kind, and the figures of the day."""

    rows: Mapping[str, Rows]
    origin: Mapping[str, Any]
    """What they depend on: files, weights, options."""
    figures: Mapping[str, Any]

    def source(self) -> NightSource:
        """Training samples of the night."""
        held = 1.0 - self.origin["general_share"]
        rows = {kind: self.rows[kind] for kind in _KINDS if kind in self.rows}  # samples depend on the order
        counts = {kind: len(found.inputs) for kind, found in rows.items() if kind != "general"}
        shares = {kind: held * count / sum(counts.values()) for kind, count in counts.items()}
        if "general" in rows:
            shares["general"] = 1.0 - held
        return NightSource(
            rows,
            shares,
            priority=self.origin["priority"],
            seed=self.origin["seed"],
        )


def write_day(directory: Path, day: Day) -> None:
    """Write both files; the second one last, so that a day without it was not finished."""
    tensors = {f"{kind}.{part}": getattr(rows, part) for kind, rows in day.rows.items() for part in _PARTS}
    with replacing(directory / _TENSORS) as temporary:
        save_file(tensors, temporary)
    digest = file_sha256(directory / _TENSORS)
    write_json(directory / _ABOUT, {"sha256": digest, "origin": dict(day.origin), "figures": dict(day.figures)})


def read_day(directory: Path, origin: Mapping[str, Any]) -> Day | None:
    """The day of a night that has begun, or None.

    Raises:
        ConsolidationError: it is another day than the one asked for, or the files are damaged.
    """
    about = directory / _ABOUT
    if not about.is_file():
        return None
    try:
        found = json.loads(about.read_text(encoding="utf-8"))
        digest, kept, figures = found["sha256"], found["origin"], found["figures"]
        if file_sha256(directory / _TENSORS) != digest:
            raise ValueError(f"{_TENSORS} is not what was written")
        tensors = load_file(directory / _TENSORS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConsolidationError(f"{about} is damaged ({error}); remove {directory} to begin the day again") from None
    wanted = json.loads(json.dumps(dict(origin)))
    other = [key for key in wanted if kept.get(key) != wanted[key]]
    if other:
        raise ConsolidationError(
            f"{directory} is the night of another day: {other[0]} was {kept.get(other[0])}, now {wanted[other[0]]}. Give what it "
            "was begun with, or another --out"
        )
    kinds = dict.fromkeys(name.partition(".")[0] for name in tensors)
    rows = {kind: Rows(*(tensors[f"{kind}.{part}"] for part in _PARTS)) for kind in sorted(kinds)}
    return Day(rows, kept, figures)
