"""Triton's interpreter, made quick enough for many small checks, right about bfloat16, and with programs that wait for others."""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def prepare_interpreter() -> None:
    """Without effect on results in fp32, and on versions of Triton that are built otherwise."""
    _patch_once_per_launch()
    _round_to_nearest()


def _round_to_nearest() -> None:
    """Conversion to bfloat16 as GPUs do it, to the nearest and to even between two: the interpreter cuts off what does not fit."""
    original = getattr(interpreter, "_convert_float", None)
    if original is None or getattr(original, "rounds", False):
        return

    def convert_float(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
            nearest = (bits + (((bits >> 16) & 1) + 0x7FFF).astype(np.uint32)) >> 16
            return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16
        return original(x, source, target, rounding_mode)

    convert_float.rounds = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert_float


def _patch_once_per_launch() -> None:
    """Exchange the functions of Triton's language once per launch, and not at every call of a device function, which takes most of
    the interpreter's time."""
    original = getattr(interpreter, "_patch_lang", None)
    if original is None or getattr(original, "once", False):
        return
    done: set[str] = set()  # modules of the language whose functions are exchanged, by name

    def patch_lang(fn: Any) -> Any:
        of_fn = _modules(fn)
        if done >= of_fn:  # in a device function, which restores nothing
            return None
        outermost = not done
        scope = original(fn)
        done.update(of_fn)
        restore = scope.restore

        def restored() -> None:
            done.clear()
            restore()

        if outermost:
            scope.restore = restored
        return scope

    patch_lang.once = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_lang


@functools.cache
def _modules(fn: Any) -> frozenset[str]:
    languages = ("triton.language", "triton.language.core")
    return frozenset(x.__name__ for x in fn.__globals__.values() if inspect.ismodule(x) and x.__name__ in languages)


def run_together(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> None:
    """A cooperative launch: every program in a thread of its own, one running at a time, and the next one's turn at each atomic
    operation. The interpreter itself ends a program before it begins the next, and would wait for ever."""
    executor = interpreter.GridExecutor(kernel.rewrite(), kernel.arg_names, (1,))
    executor.fn = _Together(executor.fn, grid)
    executor(*arguments, **constants)


class _Together:
    """Stands for a kernel's function: called once, it runs all programs of the grid."""

    def __init__(self, fn: Any, grid: tuple[int, ...]) -> None:
        self._fn, self._grid = fn, (*grid, 1, 1)[:3]
        self._places = list(itertools.product(*map(range, self._grid)))
        self._turns = [threading.Semaphore(0) for _ in self._places]
        self._left, self._error = list(range(len(self._places))), None
        self._me = threading.local()
        self.__name__, self.__globals__, self.__signature__ = fn.__name__, fn.__globals__, inspect.signature(fn)

    def __call__(self, **arguments: Any) -> None:
        threads = [threading.Thread(target=self._run, args=(i, arguments)) for i in self._left]
        builder = interpreter.interpreter_builder
        original = builder.create_atomic_rmw
        builder.set_grid_dim(*self._grid)

        def atomic(*args: Any) -> Any:
            self._pass_on()
            return original(*args)

        builder.create_atomic_rmw = atomic
        try:
            for thread in threads:
                thread.start()
            self._turns[0].release()
            for thread in threads:
                thread.join()
        finally:
            del builder.create_atomic_rmw  # the class has it
        if self._error is not None:
            raise self._error

    def _run(self, i: int, arguments: dict[str, Any]) -> None:
        self._me.number = i
        try:
            self._wait(i)
            if self._error is None:
                self._fn(**arguments)
        except BaseException as error:
            self._error = self._error or error
        following = self._after(i)
        self._left.remove(i)
        if following != i:
            self._turns[following].release()

    def _pass_on(self) -> None:
        i = self._me.number
        following = self._after(i)
        if following != i:
            self._turns[following].release()
            self._wait(i)
        if self._error is not None:
            raise RuntimeError("another program of the launch failed")

    def _after(self, i: int) -> int:
        return self._left[(self._left.index(i) + 1) % len(self._left)]

    def _wait(self, i: int) -> None:
        self._turns[i].acquire()
        interpreter.interpreter_builder.set_grid_idx(*self._places[i])
