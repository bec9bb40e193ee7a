"""Ranks that have been slow for long, from a run's metrics, and the nodes that they are on.

The ranks compare their times every few steps (hope_megatron/training/watch.py). Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launch.attempts import last_records

LASTING = 3
"""Comparisons in a row that name the same rank: it is not a passing load."""
_TAIL_BYTES = 1 << 21


class SlowRank(NamedTuple):
    """A rank that the latest comparison names."""

    rank: int
    ratio: float
    """Its computation per step over the median rank's."""
    times: int
    """Comparisons in a row that named it."""

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.ratio:.1f} times the median, in the last {self.times} comparisons"


def slow_rank(run_dir: Path, after_step: int = 0) -> SlowRank | None:
    """The rank that the latest comparison after a step names; None if it names none, or there was none."""
    compared = [
        record
        for record in last_records(run_dir, _TAIL_BYTES)
        if "straggler/ratio" in record and record["step"] > after_step
    ]
    named = [record.get("straggler/rank") for record in reversed(compared)]
    if not named or named[0] is None:
        return None
    times = next((i for i, rank in enumerate(named) if rank != named[0]), len(named))
    return SlowRank(int(named[0]), float(compared[-1]["straggler/ratio"]), times)


def slow_nodes(run_dir: Path, after_step: int, ranks_per_node: int, nodes: Sequence[str]) -> list[str]:
    """The node of a rank that has been slow for long since a step; empty if there is none, or no other node."""
    slow = slow_rank(run_dir, after_step)
    if slow is None or slow.times < LASTING or len(nodes) < 2:
        return []
    return [nodes[min(slow.rank // ranks_per_node, len(nodes) - 1)]]
