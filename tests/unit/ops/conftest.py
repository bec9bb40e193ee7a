"""Backends of the memory operator, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hope_megatron.ops.memory import memory_chunked, operator


@pytest.fixture
def backend_alone(monkeypatch) -> Callable[..., Callable[..., Any]]:
    """`memory_chunked` with one backend and no other: an error where that cannot take a case."""

    def alone(backend: Any) -> Callable[..., Any]:
        def chunked(*arguments: Any, **options: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(operator, "BACKENDS", (backend,))
                return memory_chunked(*arguments, **options)

        return chunked

    return alone
