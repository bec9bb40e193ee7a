"""Cross entropy over a vocabulary that is split over tensor-parallel ranks, without a float32 copy of the logits.

Megatron-Core's versions, fused or not, hold the exponentials of all logits in float32 until backward. Here forward keeps the logits
as they came and two numbers per token; backward makes the exponentials again and writes the gradient over the logits. The numbers
are Megatron-Core's, bit for bit in eager mode.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hope_megatron.ops.precision import wide
from hope_megatron.ops.regions import Region, region

IGNORE = -100
"""Target of positions that carry no loss."""

_ROWS_NUMEL_CPU = 2**21
_ROWS_NUMEL = 2**25
"""Logits that are worked on at once where regions are not compiled, so that float32 copies stay small: 8 and 128 MiB."""


def vocab_parallel_losses(
    logits: Tensor, targets: Tensor, *, first: int, num_valid: int, group: dist.ProcessGroup
) -> Tensor:
    """-log p(target) of every token. Backward overwrites the logits: it can be asked for once.

    Args:
        logits: this rank's columns [T, B, V], any float dtype.
        targets: [T, B] int64 token ids, the same on all ranks of the group, or IGNORE.
        first: token id of this rank's first column.
        num_valid: columns of this rank that are tokens; those after them pad the vocabulary and have no probability.
        group: the tensor-parallel group.

    Returns:
        [T, B] float32 (float64 of float64 logits), nats; 0 where the target is IGNORE.
    """
    return _Losses.apply(logits, targets, first, num_valid, group)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, num_valid: int, group: Any) -> Tensor:
        rows, target = logits.flatten(0, 1), targets.flatten()
        most = _largest(rows[:, :num_valid])
        _reduce(most, dist.ReduceOp.MAX, group)
        mine = (target >= first) & (target < first + num_valid)
        column = torch.where(mine, target - first, -1)
        chosen = wide(rows.gather(1, column.clamp(min=0).unsqueeze(1)).squeeze(1)) - most
        parts = zip(_parts(rows), most.split(_rows_at_once(rows)))
        sums = torch.stack(
            [torch.cat([_sum_exp(part, m, num_valid) for part, m in parts]), chosen.masked_fill(~mine, 0.0)]
        )
        _reduce(sums, dist.ReduceOp.SUM, group)
        total, chosen = sums
        ignored = target == IGNORE
        ctx.save_for_backward(logits, most, total, column, ignored)
        ctx.num_valid = num_valid
        return (total.log() - chosen).masked_fill(ignored, 0.0).view(targets.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, most, total, column, ignored = ctx.saved_tensors
        rows = logits.flatten(0, 1)
        columns = (most, total, column, d_losses.flatten().masked_fill(ignored, 0.0))
        for part, *numbers in zip(_parts(rows), *(x.split(_rows_at_once(rows)) for x in columns)):
            part.copy_(_gradient(part, *numbers, ctx.num_valid))
        return rows.view_as(logits), None, None, None, None


def _largest(rows: Tensor) -> Tensor:
    if rows.size(1) == 0:  # all columns of this rank pad the vocabulary
        return wide(rows.new_full(rows.shape[:1], -torch.inf))
    return wide(rows.amax(-1))


@region()
def _sum_exp(rows: Tensor, most: Tensor, num_valid: int) -> Tensor:
    return _exponentials(rows, most, num_valid).sum(-1)


@region()
def _gradient(rows: Tensor, most: Tensor, total: Tensor, column: Tensor, d_loss: Tensor, num_valid: int) -> Tensor:
    """(softmax - one hot) d_loss, in the dtype of the logits."""
    softmax = _exponentials(rows, most, num_valid) / total.unsqueeze(1)
    ids = torch.arange(rows.size(1), device=rows.device)
    return ((softmax - (ids == column.unsqueeze(1)).to(softmax.dtype)) * d_loss.unsqueeze(1)).to(rows.dtype)


def _exponentials(rows: Tensor, most: Tensor, num_valid: int) -> Tensor:
    """exp(logit - most) in float32; 0 for columns that pad the vocabulary."""
    exponentials = (wide(rows) - most.unsqueeze(1)).exp()
    if num_valid == rows.size(1):
        return exponentials
    return exponentials.masked_fill(torch.arange(rows.size(1), device=rows.device) >= num_valid, 0.0)


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(_rows_at_once(rows))


def _rows_at_once(rows: Tensor) -> int:
    if Region.compiles and (Region.runner is not None or rows.is_cuda):
        return rows.size(0)  # a compiled region makes no copies
    return max(1, (_ROWS_NUMEL if rows.is_cuda else _ROWS_NUMEL_CPU) // rows.size(1))


def _reduce(values: Tensor, op: Any, group: dist.ProcessGroup) -> None:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
