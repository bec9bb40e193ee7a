"""The chunk form under autograd: every rule, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.registry import Backend, computes_in_full
from hope_megatron.ops.memory.chunk import chunk_scan
from hope_megatron.ops.memory.layout import Group
from hope_megatron.ops.memory.recompute import recomputed_scan, segment_periods
from hope_megatron.ops.memory.rule import MemoryCompute, MemoryRule


def autograd_scan(
    tensors: list[Tensor | None], rule: MemoryRule, groups: tuple[Group, ...],
    *, compute: MemoryCompute, recompute: bool,
) -> tuple[Tensor, tuple[Group, ...]]:  # fmt: skip
    """See `Backend.scan`."""
    B, T, H, _ = tensors[0].shape
    rows = [None if x is None else x.transpose(1, 2).flatten(0, 1) for x in tensors]
    if recompute and torch.is_grad_enabled():
        periods = segment_periods(compute.keep_every, T, rule.period, groups)
        y, groups = recomputed_scan(chunk_scan, rows, rule, groups, 0, periods * rule.period)
    else:
        y, groups = chunk_scan(rows, rule, groups, 0)
    return y.unflatten(0, (B, H)).transpose(1, 2), groups


AUTOGRAD = Backend("the chunk form (PyTorch, autograd)", "torch", computes_in_full, autograd_scan)
