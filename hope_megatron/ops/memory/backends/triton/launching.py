"""How kernels are declared and launched; and what would be launched, for counting and for compiling without a GPU."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

kernel = functools.partial(triton.jit, do_not_specialize=("T", "HEADS", "chunks", "plane", "span"))
"""Decorates a kernel. Lengths and counts of heads are arguments like others: one compilation serves all."""


class Launch(NamedTuple):
    """One launch, as `recorded` keeps it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors on the device "meta"
    constants: dict[str, Any]
    warps: int


_record: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("recorded launches", default=None)


def launch(
    function: Any, grid: tuple[int, ...], *arguments: Tensor | int | float, warps: int | None = None, **constants: Any
) -> None:
    """Run `function` on a grid of programs. warps: of a program; None: 4, and 8 where a tile has 128 rows."""
    if warps is None:
        warps = 8 if max(constants.get(name, 0) for name in ("C", "D", "H", "P", "Q")) > 64 else 4
    record = _record.get()
    if record is None:
        function[grid](*arguments, **constants, num_warps=warps, num_stages=1)
        return
    names = function.arg_names[: len(arguments)]
    like = lambda x: torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")  # noqa: E731
    known = {name: like(x) if isinstance(x, Tensor) else x for name, x in zip(names, arguments)}
    record.append(Launch(function, grid, known, constants, warps))


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches of this thread instead of running them: results are whatever memory held.

    The host's code runs as always, so its tensors may be on the CPU or on "meta".
    """
    found: list[Launch] = []
    token = _record.set(found)
    try:
        yield found
    finally:
        _record.reset(token)
