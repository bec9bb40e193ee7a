"""Which backend computes a layer's memories: chosen once per shape, said once, and kept for the run's record.

A backend is one value: its name, what it cannot take, and its scan. ops/memory_backends.py lists them, best first.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory.rule import MemoryCompute, MemoryRule
from hope_megatron.ops.memory.types import MemoryParams

log = logging.getLogger(__name__)

RETIRED = "HOPE_NATIVE"
"""Environment variable that used to choose; `memory.kernel` does now."""


class KernelError(RuntimeError):
    """The kernel that was asked for cannot be used here. The message says why and what to set."""

    is_user_error = True


class Case(NamedTuple):
    """What a backend is asked to compute: everything that its answer may depend on."""

    rule: MemoryRule
    rates: tuple[bool, bool, bool]
    """Whether eta, alpha and theta have logits."""
    streams: int
    """N = B H."""
    d: int
    h: int
    """Hidden width of a memory; d for a matrix."""
    dtype: torch.dtype
    device: str
    """Type of the device: "cpu", "cuda", ..."""
    precision: str
    """`MemoryCompute.precision`."""
    plain: bool
    """Whether inputs are ordinary tensors: not fake ones, not those of a functional transform."""

    @classmethod
    def of(cls, tensors: list[Tensor | None], params: MemoryParams, rule: MemoryRule, compute: MemoryCompute) -> Case:
        """tensors: q, x_k, x_v [B, T, H, d], logits of eta, alpha, theta or None."""
        q, w_in = tensors[0], params.mem.w_in
        (B, _, H, d), rates = q.shape, tuple(x is not None for x in tensors[3:])
        h = d if w_in is None else w_in.size(-2)
        plain = type(q) in (Tensor, torch.nn.Parameter)
        return cls(rule, rates, B * H, d, h, q.dtype, q.device.type, compute.precision, plain)


def computes_in_full(case: Case) -> str | None:
    """The reason of a backend that knows no other precision than that of its inputs."""
    return None if case.precision == "fp32" else f"it computes in fp32, not in {case.precision}"


class Backend(NamedTuple):
    """One way to compute whole periods."""

    name: str
    kernel: str
    """The value of `memory.kernel` that asks for it."""
    why_not: Callable[[Case], str | None]
    """Why it cannot take a case, in words; None if it can."""
    scan: Callable[..., tuple[Tensor, Any]]
    """(tensors, rule, groups, *, compute, recompute) -> y [B, T, H, d], groups.

    tensors: q, x_k, x_v [B, T, H, d] and three logits [B, T, H] or None, in one dtype. T is a multiple of the rule's period and
    begins at a border. compute, recompute: see `memory_chunked`."""
    unwise: Callable[[Case], str | None] = lambda case: None
    """Why `auto` passes it over although it could, as long as another can; None if it does not."""


def choose(case: Case, compute: MemoryCompute, backends: tuple[Backend, ...]) -> Backend:
    """The first of the backends that can take a case.

    Raises:
        KernelError: if the kernel that was asked for cannot take it.
    """
    if RETIRED in os.environ:
        raise KernelError(
            f"{RETIRED} chooses no kernel any more; unset it and set model.memory.kernel=torch (instead of {RETIRED}=0), "
            "or cpu, or auto"
        )
    return _choose(case, compute, backends)


@functools.lru_cache(maxsize=256)
def _choose(case: Case, compute: MemoryCompute, backends: tuple[Backend, ...]) -> Backend:
    reasons: list[str] = []
    possible = None
    for backend in backends:
        if compute.kernel not in ("auto", backend.kernel):
            continue
        reason = backend.why_not(case)
        if reason is None:
            possible = possible or backend
            reason = backend.unwise(case) if compute.kernel == "auto" else None
        if reason is None:
            _record(backend, case, reasons)
            return backend
        reasons.append(f"{backend.name}: {reason}")
    if possible is not None:
        _record(possible, case, reasons)
        return possible
    raise KernelError(
        f"memory.kernel={compute.kernel} cannot compute these memories ({_shape(case)}): "
        f"{'; '.join(reasons) or 'this installation does not have it'}. Set memory.kernel=auto"
    )


chosen_kernels: list[dict[str, Any]] = []
"""What was chosen so far in this process, one entry per layer shape: for the record of a run."""


def _record(backend: Backend, case: Case, reasons: list[str]) -> None:
    entry = {"shape": _shape(case), "kernel": backend.name, "passed_over": reasons}
    if entry not in chosen_kernels:
        chosen_kernels.append(entry)
        passed = f"; not {'; not '.join(reasons)}" if reasons else ""
        log.info("memories (%s) are computed by %s%s", entry["shape"], backend.name, passed)


def _shape(case: Case) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    return f"d {case.d}, h {case.h}, chunks of {case.rule.chunk_tokens}, {dtype} on {case.device}"
