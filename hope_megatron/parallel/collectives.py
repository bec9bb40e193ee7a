"""Every collective of this process, told to its heart: which one, since when, and how long it waited for others.

PyTorch's functions, Megatron-Core and DeepSpeed all end in the methods of ProcessGroup and Work, whatever names they were imported
under, so those are wrapped. A position in the sequence of collectives is the same on all ranks at the same place of the program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from hope_megatron.runtime.heartbeat import HEART

_STARTERS = (
    "allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced",
    "alltoall", "alltoall_base", "broadcast", "reduce", "gather", "scatter", "barrier", "send", "recv",
)  # fmt: skip
_MARK = "_hope_recorded"


def record_collectives() -> None:
    """Wrap what starts and what waits for a collective; a second call changes nothing."""
    for name in _STARTERS:
        _wrap(dist.ProcessGroup, name, _starting)
    _wrap(dist.Work, "wait", _waiting)


def _wrap(owner: type, name: str, wrapper: Callable[[Callable[..., Any], str], Callable[..., Any]]) -> None:
    method = getattr(owner, name, None)
    if method is not None and not hasattr(method, _MARK):
        wrapped = wrapper(method, name.strip("_"))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)


def _starting(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def start(*args: Any, **kwargs: Any) -> Any:
        HEART.begin_collective(name)
        work = method(*args, **kwargs)
        HEART.end_collective()
        return work

    return start


def _waiting(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def wait(*args: Any, **kwargs: Any) -> Any:
        with HEART.waiting():
            return method(*args, **kwargs)

    return wait
