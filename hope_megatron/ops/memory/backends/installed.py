"""The backends of the memory operator that ops/memory_backends.py names, imported. An exported model has a list of its own."""

from __future__ import annotations

from hope_megatron.ops.memory.backends.registry import Backend
from hope_megatron.ops.memory_backends import MEMORY_BACKENDS

BACKENDS: tuple[Backend, ...] = tuple(map(MEMORY_BACKENDS.open, MEMORY_BACKENDS))
