"""Triton's interpreter, made quick enough for many small checks."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from triton.runtime import interpreter


def hasten() -> None:
    """Exchange the functions of Triton's language once per launch, and not at every call of a device function, which takes most of
    the interpreter's time. Without effect on results, and on versions that are built otherwise."""
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
