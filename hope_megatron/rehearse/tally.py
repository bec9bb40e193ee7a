"""What was counted, as a vector: tallies add up, and that of a deep model is linear in its layers."""

from __future__ import annotations

from collections import Counter
from typing import Any

Tally = Counter[tuple[Any, ...]]
"""Counts by (what, ...): `FIELDS` names the rest of a key."""

FIELDS = {
    "op": ("phase", "family", "operator"),
    "kernels": ("phase", "family"),
    "bytes": ("phase", "family"),
    "flops": ("phase", "family", "dtype"),
    "steps": ("phase", "family"),
    "collective": ("phase", "operator", "group", "way"),
    "collective_bytes": ("phase", "operator", "group", "way"),
    "wait": ("phase", "where"),
    "agreement": ("phase", "where"),
}
"""What stands in a key after its kind.

op: calls of an operator. kernels: those it starts on a GPU. bytes: read and written. flops: of products, solves and attention.
steps: chunks that kernels go through one after the other.
collective: calls; way: exposed, or overlapped. collective_bytes: of the
largest operand. wait: the host waits for the device. agreement: the host waits for other hosts.
"""

PHASES = ("forward", "recompute", "backward", "reduction", "update", "other")
"""Phases of a step in their order. reduction: what follows backward, accumulating gradients and reducing them over ranks."""


def combined(*terms: tuple[float, Tally]) -> Tally:
    """Sum of factor x tally."""
    total: Tally = Counter()
    for factor, tally in terms:
        for key, value in tally.items():
            total[key] += factor * value  # type: ignore[assignment]
    return total


def total(tally: Tally, what: str, **where: str) -> float:
    """Sum of the entries of a kind, of those with the given values of its fields."""
    places = {FIELDS[what].index(name) + 1: value for name, value in where.items()}
    return sum(value for key, value in tally.items() if key[0] == what and all(key[i] == x for i, x in places.items()))


def grouped(tally: Tally, what: str, *by: str) -> dict[tuple[str, ...], float]:
    """Sums of the entries of a kind by some of its fields, without those that are zero."""
    places = [FIELDS[what].index(name) + 1 for name in by]
    found: Counter[tuple[str, ...]] = Counter()
    for key, value in tally.items():
        if key[0] == what:
            found[tuple(key[i] for i in places)] += value
    return {key: value for key, value in found.items() if abs(value) > 1e-12}


def phases_of(tally: Tally) -> list[str]:
    """Phases that occur, in their order."""
    seen = {key[1] for key in tally}
    return [phase for phase in PHASES if phase in seen]
