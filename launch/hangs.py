"""What the watchdogs' reports of a hang say together: which rank is behind, in which phase and collective."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_megatron.runtime.records import read_object
from launch.watchdog import HANG_PREFIX

_STATES = {"T": "stopped by a signal", "D": "waiting for a disk or a network file system"}


@dataclass(frozen=True)
class Hang:
    """A hang, and whom it is put down to."""

    rank: int | None
    """The rank that is behind; None if no rank is behind the others."""
    node: str
    step: int
    phase: str
    text: str


def read_hang(reports: Path) -> Hang | None:
    """The hang that the watchdogs of an attempt reported; None if there was none."""
    found = [report for path in sorted(reports.glob(f"{HANG_PREFIX}*.json")) if (report := read_object(path))]
    ranks = [{**rank, "node": report["node"]} for report in found for rank in report.get("ranks", [])]
    if not found:
        return None
    if silent := [report["node"] for report in found if report.get("missing")]:
        return Hang(None, silent[0], 0, "start-up", f"ranks on {silent[0]} did not come up within their limit")
    return diagnose(ranks)


def diagnose(ranks: list[dict[str, Any]]) -> Hang:
    """Whom a hang is put down to: stopped ranks first, then the one whose position in the program is smallest."""
    for rank in ranks:
        if rank["state"] in _STATES:
            return _hang(rank, f"{_STATES[rank['state']]}, in phase {rank['phase']}", ranks)
    first = min(ranks, key=lambda rank: tuple(rank["position"]))
    others = [rank for rank in ranks if rank["position"] != first["position"]]
    if others:
        return _hang(first, f"behind the others, in {_place(first)}", ranks)
    outside = [rank for rank in ranks if rank["in_collective_s"] is None]
    if outside and len(outside) < len(ranks):
        return _hang(outside[0], f"outside of the collective that the others wait in, in {_place(outside[0])}", ranks)
    if len(ranks) == 1:
        return _hang(first, f"in {_place(first)}", ranks)
    text = f"all ranks stand in {_place(first)} of step {first['step']}; none is behind"
    return Hang(None, first["node"], first["step"], first["phase"], text)


def _hang(rank: dict[str, Any], how: str, ranks: list[dict[str, Any]]) -> Hang:
    text = f"rank {rank['rank']} on {rank['node']} hangs at step {rank['step']}: {how}, {rank['since_s']:.0f} s without progress"
    waiting = Counter(
        other["collective"] for other in ranks if other is not rank and other["in_collective_s"] is not None
    )
    if waiting:
        name, count = waiting.most_common(1)[0]
        text += f"; {count} of {len(ranks) - 1} others wait in {name}"
    return Hang(rank["rank"], rank["node"], rank["step"], rank["phase"], text)


def _place(rank: dict[str, Any]) -> str:
    if rank["in_collective_s"] is not None:
        return f"{rank['collective']} (collective {rank['position'][1]}) of phase {rank['phase']}"
    return f"phase {rank['phase']}"


def keep_reports(reports: Path, kept: Path) -> None:
    """Copy the reports of a hang, with a text file of stacks for each rank, to where the next attempt leaves them."""
    kept.mkdir(parents=True, exist_ok=True)
    for path in reports.glob(f"{HANG_PREFIX}*.json"):
        shutil.copyfile(path, kept / path.name)
        for rank in (read_object(path) or {}).get("ranks", []):
            (kept / f"stack-rank-{rank['rank']:05d}.txt").write_text(rank["stack"], encoding="utf-8")
