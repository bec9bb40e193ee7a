"""How kernels are declared and launched; and what would be launched, for counting and for compiling without a GPU."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

kernel = functools.partial(triton.jit, do_not_specialize=("T", "HEADS", "chunks", "plane", "span", "first", "streams"))
"""Decorates a kernel. Lengths and counts of heads are arguments like others: one compilation serves all."""


def constants(setting: Any, *names: str) -> dict[str, Any]:
    """Fields of a setting as what kernels are specialised on: `anchored` is ANCHORED there."""
    return {name.upper(): getattr(setting, name) for name in names}


class Launch(NamedTuple):
    """One launch, as `recorded` keeps it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors on the device "meta"
    constants: dict[str, Any]
    warps: int


Observer = Callable[[Any, tuple[int, ...], dict[str, Any], dict[str, Any], int], None]
"""(kernel, grid, arguments by name, constants, warps) of a launch that is not made."""

_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("who is told of launches", default=None)


def launch(
    function: Any, grid: tuple[int, ...], *arguments: Tensor | int | float, warps: int | None = None, **constants: Any
) -> None:
    """Run `function` on a grid of programs. warps: of a program; None: 4, and 8 where a tile has 128 rows."""
    _launch(function, grid, arguments, constants, _warps(constants) if warps is None else warps)


def launch_together(function: Any, grid: tuple[int, int], *arguments: Tensor | int | float, **constants: Any) -> None:
    """`launch` of (streams, programs of a stream) where programs of a stream wait for each other, so that all must run at once.

    Streams go in groups that fit the GPU; the last argument, which is added here, is a group's first stream.
    """
    streams, programs = grid
    warps, first = _warps(constants), 0
    most = streams if programs == 1 else max(1, _programs_at_once(warps) // programs)
    while first < streams:
        some = min(most, streams - first)
        _launch(function, (some, programs), (*arguments, first), constants, warps, together=programs > 1)
        first += some


def _programs_at_once(warps: int) -> int:
    """Of at most 255 registers a thread, on this GPU, or an H100 where none is."""
    there = torch.cuda.is_available()
    count = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count if there else 132
    return count * max(1, 8 // warps)


def _warps(constants: dict[str, Any]) -> int:
    return 8 if max(constants.get(name, 0) for name in ("C", "D", "H", "P", "Q")) > 64 else 4


def _launch(
    function: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    constants: dict[str, Any],
    warps: int,
    *,
    together: bool = False,
) -> None:
    observer = _observer.get()
    if observer is not None:
        observer(function, grid, dict(zip(function.arg_names, arguments)), constants, warps)
    elif not together:
        function[grid](*arguments, **constants, num_warps=warps, num_stages=1)
    elif triton.knobs.runtime.interpret:
        from hope_megatron.ops.memory.backends.triton.interpreting import run_together

        run_together(function, grid, arguments, constants)
    else:
        function[grid](*arguments, **constants, num_warps=warps, num_stages=1, launch_cooperative_grid=True)


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell `observer` of launches of this thread instead of making them: results are whatever memory held.

    The host's code runs as always, so its tensors may be on the CPU, on "meta", or fake.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches of this thread instead of making them; see `observed`."""
    found: list[Launch] = []

    def note(
        function: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any], warps: int
    ) -> None:
        like = lambda x: torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")  # noqa: E731
        known = {name: like(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        found.append(Launch(function, grid, known, constants, warps))

    with observed(note):
        yield found
