"""Seeded damage to files: what disks, copies and people do to them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

Damage = Callable[[], str]
"""Does it, and says what it did."""


def mutations(directory: Path, work: Path, count: int, seed: int) -> Iterator[tuple[Path, str]]:
    """Copies of a directory, each with one damage to one file: a flipped bit, a cut, a swap, a deletion, noise.

    Args:
        directory: the good files.
        work: where the copy is made; the same path each time, fresh for each damage.
        count: how many copies.
        seed: of the choice of files, places and kinds.

    Yields:
        (the damaged copy, what was done to it)
    """
    rng = random.Random(seed)
    for number in range(count):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(directory, work)
        yield work, f"{number}: {damage(work, rng)}"


def damage(directory: Path, rng: random.Random) -> str:
    """Damage one file of a directory; returns what was done."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    name = str(path.relative_to(directory))
    kind = rng.choices(("flip", "cut", "delete", "swap", "noise", "empty", "line"), (12, 3, 1, 2, 2, 1, 3))[0]
    if kind == "flip" and data:
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        data[place] ^= 1 << bit
        kind = f"bit {bit} of byte {place} flipped"
    elif kind == "cut" and data:
        del data[rng.randrange(len(data)) :]
        kind = f"cut to {len(data)} bytes"
    elif kind == "noise" and data:
        place = rng.randrange(len(data))
        data[place : place + 8] = rng.randbytes(len(data[place : place + 8]))
        kind = f"noise at byte {place}"
    elif kind == "line" and data.count(b"\n") > 1:
        lines = data.split(b"\n")
        gone = rng.randrange(len(lines))
        data = bytearray(b"\n".join(lines[:gone] + lines[gone + 1 :]))
        kind = f"line {gone + 1} taken out"
    elif kind == "swap" and len(files) > 1:
        other = rng.choice([file for file in files if file != path])
        content = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(content)
        return f"{name} and {other.relative_to(directory)} swapped"
    elif kind == "delete":
        path.unlink()
        return f"{name} deleted"
    else:
        data, kind = bytearray(), "emptied"
    path.write_bytes(data)
    return f"{name}: {kind}"
