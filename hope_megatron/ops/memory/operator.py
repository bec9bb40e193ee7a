"""The memory operator, computed by what suits the device best: what trains.

Whole periods of a stream go to a backend (backends/registry.py). What a cut leaves of a chunk goes through the chunk form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.installed import BACKENDS
from hope_megatron.ops.memory.backends.registry import Backend, Case, choose
from hope_megatron.ops.memory.chunk import chunk_scan
from hope_megatron.ops.memory.layout import Group, join_state, split_state
from hope_megatron.ops.memory.rule import AUTO, MemoryCompute, MemoryRule
from hope_megatron.ops.memory.types import MemoryParams, MemoryState, RateLogits, check_arguments, initial_state


def memory_chunked(
    q: Tensor, k: Tensor, v: Tensor, logits: RateLogits,
    params: MemoryParams, rule: MemoryRule, state: MemoryState | None = None,
    *, compute: MemoryCompute = AUTO, recompute: bool = False, backends: tuple[Backend, ...] = BACKENDS,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """Read and write the memories of every head along a piece of a stream (eqs. 83-93).

    Args:
        q, k, v: projected and convolved inputs x^q, x^k, x^v, each [B, T, H, d]; any T of at least 1.
        logits: static parts of the rates, each [B, T, H] or None.
        params: learned initial memories, [H, n, ...]; used when `state` is None.
        rule: how the memories learn.
        state: where an earlier piece of the same streams ended; None starts new streams.
        compute: which kernel, in which precision, and how often weights are kept.
        recompute: keep only weights for backward, those of every `compute.keep_every`-th chunk, and recompute the rest.

        backends: what to choose among, best first.

    Returns:
        y [B, T, H, d] in q's dtype, and the state after the last token. Differentiable with respect to everything,
        through all writes.

    Computes in float32 (float64 if q is float64) whatever the input dtype.

    Raises:
        MemoryRuleError: for shapes that do not fit each other or the rule.
        KernelError: if `compute` asks for a kernel that cannot take them.
    """
    check_arguments(q, k, v, logits, params, rule, state)
    B, T, H, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    fresh = initial_state(params, B, momentum=logits.theta is not None, dtype=dtype)
    state = fresh if state is None else state
    anchored = logits.alpha is not None and rule.decay_to == "initial"
    groups = split_state(state, rule, fresh.now if anchored else None)
    tensors = [x if x is None else x.to(dtype) for x in (q, k, v, *logits)]
    backend = choose(Case.of(tensors, params, rule, compute), compute, backends)

    def whole(tensors: list[Tensor | None], groups: tuple[Group, ...], position: int):
        return backend.scan(tensors, rule, groups, compute=compute, recompute=recompute)

    def part(tensors: list[Tensor | None], groups: tuple[Group, ...], position: int):
        rows = [None if x is None else x.transpose(1, 2).flatten(0, 1) for x in tensors]
        y, groups = chunk_scan(rows, rule, groups, position)
        return y.unflatten(0, (B, H)).transpose(1, 2), groups

    y, groups = _between_borders(whole, part, tensors, rule.period, groups, state.position)
    return y.to(q.dtype), join_state(groups, rule, B, state.position + T)


Scan = Callable[[list, tuple[Group, ...], int], tuple[Tensor, tuple[Group, ...]]]


def _between_borders(
    whole: Scan, part: Scan, tensors: list[Tensor | None], period: int, groups: tuple[Group, ...], position: int
) -> tuple[Tensor, tuple[Group, ...]]:
    """`whole` for whole periods, which is all that it can; `part` before the first border and after the last one."""
    T = tensors[0].size(1)
    head = min(T, -position % period)
    lengths = [head, (T - head) // period * period, (T - head) % period]
    if lengths[1] == T:
        return whole(tensors, groups, position)
    pieces = zip(*((None, None, None) if x is None else x.split(lengths, 1) for x in tensors))
    outputs = []
    for length, piece, way in zip(lengths, pieces, (part, whole, part)):
        if length:
            y, groups = way(list(piece), groups, position)
            position += length
            outputs.append(y)
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], groups
