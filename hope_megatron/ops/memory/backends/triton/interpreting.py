"""Triton's interpreter, made quick enough for many small checks, and right about bfloat16."""

from __future__ import annotations

import functools
import inspect
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
