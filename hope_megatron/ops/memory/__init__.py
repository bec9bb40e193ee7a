"""Associative memories that learn as they read: one operator for HOPE, Titans, TTT, DeltaNet and RetNet.

`memory_recurrent` is the token loop that reads like the paper; `memory_chunked` is what trains. They share a signature
and are equal to rounding. The derivation is in README.md beside this file.
"""

from hope_megatron.ops.memory import native  # noqa: F401
from hope_megatron.ops.memory.chunk import memory_chunked
from hope_megatron.ops.memory.documents import memory_documents
from hope_megatron.ops.memory.recurrent import memory_recurrent
from hope_megatron.ops.memory.types import Bank, MemoryParams, MemoryRule, MemoryState, RateLogits, initial_state

__all__ = [
    "Bank",
    "MemoryParams",
    "MemoryRule",
    "MemoryState",
    "RateLogits",
    "initial_state",
    "memory_chunked",
    "memory_documents",
    "memory_recurrent",
]
