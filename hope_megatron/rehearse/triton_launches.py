"""The memories' Triton kernels in a rehearsal: the backend's own host code runs, and its launches are counted instead of made.

Bytes are those of all operands, once. FLOPs are the closed forms of `config/accounting.py`: what the kernels multiply, without
what they compute again. A kernel that goes from chunk to chunk takes as long as its chunks one after the other.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

from torch import Tensor

from hope_megatron.config.accounting import memory_macs
from hope_megatron.config.model import ModelConfig
from hope_megatron.config.step_time import PROGRAMS_AT_ONCE
from hope_megatron.ops.memory.backends import registry
from hope_megatron.ops.memory.backends.registry import Backend, Case
from hope_megatron.ops.memory.backends.triton import unchecked
from hope_megatron.ops.memory.rule import MemoryCompute
from hope_megatron.rehearse.operators import tensors_in
from hope_megatron.rehearse.watch import Watch

_BACKWARD = 3
"""Products of the backward kernels over those of the forward ones: two gradients, and the tape computed again."""


class TritonLaunches:
    """Stands in for the Triton backend on the GPU that is rehearsed."""

    def __init__(self, watch: Watch, model: ModelConfig) -> None:
        self._watch, self._model = watch, model
        self._observing = contextlib.ExitStack()

    def __enter__(self) -> TritonLaunches:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._observing.close()

    def choose(self, case: Case, compute: MemoryCompute, backends: tuple[Backend, ...]) -> Backend:
        """What `registry.choose` would choose on a GPU where the kernels are trusted."""
        known = [backend for backend in backends if backend.kernel != "triton"]
        if len(known) < len(backends) or compute.kernel == "triton":
            known.insert(0, Backend("Triton kernels", "triton", why_not, self.scan))
        return registry.choose(case, compute, tuple(known))

    def scan(
        self, tensors: list[Tensor | None], rule: Any, groups: Any, *, compute: MemoryCompute, recompute: bool
    ) -> Any:
        """See `Backend.scan`."""
        self._observe()
        q = tensors[0]
        assert q is not None
        B, T, H, _ = q.shape
        flops = 2.0 * sum(memory_macs(self._model, T)) * B * T * H
        dtype = "bfloat16" if compute.precision == "bf16" else "float32"  # these kernels never take TF32 for it
        y, groups = unchecked.scan(tensors, rule, groups, compute=compute, recompute=recompute)
        self._count_flops(dtype, flops)
        if y.requires_grad:
            y.register_hook(lambda _gradient: self._count_flops(dtype, _BACKWARD * flops))
        return y, groups

    def _observe(self) -> None:
        """From now on: backward launches too, long after `scan`."""
        from hope_megatron.ops.memory.backends.triton.launching import observed

        self._observing.close()
        self._observing.enter_context(observed(self._launched))

    def _count_flops(self, dtype: str, flops: float) -> None:
        self._watch.tally["flops", self._watch.phase, "memories", dtype] += flops  # type: ignore[assignment]

    def _launched(
        self, function: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: Any, warps: int
    ) -> None:
        operands = {x.untyped_storage()._cdata: x for x in tensors_in(list(arguments.values()), [])}
        if arguments.get("first", 0) > 0:  # further streams of the same operands, which are counted already
            operands.clear()
        steps = 0
        if len(grid) == 1 or "first" in arguments:  # a program per stream (and memory), which goes from chunk to chunk
            steps = arguments["chunks"] * -(-math.prod(grid) // PROGRAMS_AT_ONCE)
        self._watch.count_kernel(function.__name__, "memories", list(operands.values()), [], steps=steps)


def why_not(case: Case) -> str | None:
    """Why the kernels cannot take a case on a GPU where they are trusted."""
    case = case._replace(plain=True)
    return unchecked._why_not_rule(case) or unchecked._why_not_shape(case)
