"""Sees every operator below autograd: kernels, bytes, FLOPs, collectives, host waits, and the storages that come and go.

Works on fake tensors, in a rehearsal, and on real ones, which is how rehearsals are tested.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hope_megatron.rehearse.memory import MemoryLog
from hope_megatron.rehearse.operators import (
    Family,
    Kind,
    bytes_of,
    flops_of,
    kind_of,
    tensors_in,
    together,
    written_in_place,
)
from hope_megatron.rehearse.tally import Tally

StandIn = Callable[[Tensor], Any]
"""A value for a tensor that has none."""


class Watch(TorchDispatchMode):
    """Counts into `tally`; `phase` and `module` say where.

    Args:
        stand_in: gives the host a value where it reads one from the device; None: the real one.
        rounded: see MemoryLog.
    """

    def __init__(self, *, stand_in: StandIn | None = None, rounded: bool = True) -> None:
        super().__init__()
        self._rounded = rounded
        self.begin_anew()
        self.overlapping = False
        """Whether what runs now runs beside the main stream."""
        self.group_names: dict[tuple[int, ...], str] = {}
        """What to call a process group, by its ranks."""
        self.groups: dict[str, tuple[int, ...]] = {}
        """Ranks of the groups that communicated, by name."""
        self._stand_in = stand_in
        self.run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] = lambda func, args, kwargs: func(
            *args, **kwargs
        )
        """Runs an operator."""
        self._hidden = False
        self._kinds: dict[Any, Kind] = {}

    def begin_anew(self) -> None:
        """Forget what was counted, and the storages that are there."""
        self.tally: Tally = Counter()
        self.memory = MemoryLog(self._rounded)
        self.phase, self.module = "build", "build"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._hidden or func.namespace == "prim":
            return self.run(func, args, kwargs)
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = kind_of(func)
        if kind.waits:
            self.tally["wait", self.phase, calling_line()] += 1
            if self._stand_in is not None and kind.name == "_local_scalar_dense":
                return self._stand_in(args[0])
        if kind.is_collective:
            self._collective(kind, args, kwargs)
        self.memory.time += 1
        out = self.run(func, args, kwargs)
        if kind.is_view:
            return out
        outputs = tensors_in(out, [])
        if kind.kernels:
            self._count(func, kind, args, kwargs, out, outputs)
        label = f"{self.module} {kind.name}"
        for tensor in outputs:
            self.memory.see(tensor, label)
        return out

    def _count(self, func: Any, kind: Kind, args: tuple, kwargs: dict, out: Any, outputs: list[Tensor]) -> None:
        tally, phase, family = self.tally, self.phase, kind.family
        inputs = tensors_in(args, [])
        if kwargs:
            tensors_in(list(kwargs.values()), inputs)
        moved = sum(map(bytes_of, inputs)) + sum(map(bytes_of, outputs or written_in_place(func, args)))
        dtype = inputs[0].dtype if inputs else outputs[0].dtype if outputs else torch.float32
        flops = flops_of(func, kind, args, kwargs, out)
        tally["op", phase, family, kind.name] += 1
        tally["kernels", phase, family] += together(inputs) if kind.name.startswith("_foreach") else kind.kernels
        tally["bytes", phase, family] += moved
        if flops:
            tally["flops", phase, family, math_dtype(dtype)] += flops

    def _collective(self, kind: Kind, args: tuple, kwargs: dict) -> None:
        operands = tensors_in(args, [])
        ranks = _ranks_of((*args, *kwargs.values()))
        if len(ranks) < 2:
            return
        name = self.group_names.get(ranks, f"{len(ranks)} ranks")
        self.groups[name] = ranks
        way = "overlapped" if self.overlapping else "exposed"
        size = max((x.numel() * x.element_size() for x in operands), default=0)
        operator = kind.name.strip("_").removesuffix("_base")
        self.tally["collective", self.phase, operator, name, way] += 1
        self.tally["collective_bytes", self.phase, operator, name, way] += size

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Count nothing for a while."""
        outer, self._hidden = self._hidden, True
        try:
            yield
        finally:
            self._hidden = outer

    def count_kernel(
        self,
        name: str,
        family: Family,
        inputs: list[Tensor],
        outputs: list[Tensor],
        kernels: int = 1,
        flops: float = 0,
        steps: int = 0,
    ) -> None:
        """Count what no operator says: a fused kernel, by what it reads and writes. steps: see tally.FIELDS."""
        self.memory.time += 1
        self.tally["op", self.phase, family, name] += 1
        self.tally["kernels", self.phase, family] += kernels
        self.tally["bytes", self.phase, family] += sum(map(bytes_of, inputs)) + sum(map(bytes_of, outputs))
        if flops:
            self.tally["flops", self.phase, family, math_dtype(inputs[0].dtype)] += flops  # type: ignore[assignment]
        if steps:
            self.tally["steps", self.phase, family] += steps
        for tensor in outputs:
            self.memory.see(tensor, f"{self.module} {name}")

    def take(self) -> Tally:
        """What was counted since the last call."""
        taken, self.tally = self.tally, Counter()
        return taken


def math_dtype(dtype: torch.dtype) -> str:
    """The precision that a GPU would multiply in: float32 may mean TF32."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def calling_line() -> str:
    """The innermost line on the stack that is neither PyTorch's nor of this package."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and "/hope_megatron/rehearse/" not in file:
            for package in ("hope_megatron/", "megatron/", "deepspeed/"):
                if f"/{package}" in file:
                    return f"{package}{file.rsplit(package, 1)[1]}:{frame.f_lineno}"
            return f"{file.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def _ranks_of(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            group = dist.ProcessGroup.unbox(argument)
            return tuple(dist.get_process_group_ranks(group))
    return ()
