"""Associative memories that learn as they read: one operator for HOPE, Titans, TTT, DeltaNet and RetNet.

`memory_recurrent` is the token loop that reads like the paper; `memory_chunked` is what trains. They share a signature
and are equal to rounding. The derivation is in README.md beside this file.

`rule` imports no torch, so that configuration can use it; the names below bring torch when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hope_megatron.ops.memory.rule import MemoryCompute, MemoryRule, MemoryRuleError
from hope_megatron.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from hope_megatron.ops.memory.operator import memory_chunked
    from hope_megatron.ops.memory.packed import memory_packed
    from hope_megatron.ops.memory.recurrent import memory_recurrent
    from hope_megatron.ops.memory.types import Bank, MemoryParams, MemoryState, RateLogits, initial_state

_HOMES = {
    "memory_chunked": "operator",
    "memory_packed": "packed",
    "memory_recurrent": "recurrent",
    **dict.fromkeys(("Bank", "MemoryParams", "MemoryState", "RateLogits", "initial_state"), "types"),
}

__all__ = [
    "Bank",
    "MemoryCompute",
    "MemoryParams",
    "MemoryRule",
    "MemoryRuleError",
    "MemoryState",
    "RateLogits",
    "initial_state",
    "memory_chunked",
    "memory_packed",
    "memory_recurrent",
]


__getattr__ = lazy_names(__name__, {name: f"{__name__}.{module}" for name, module in _HOMES.items()})
