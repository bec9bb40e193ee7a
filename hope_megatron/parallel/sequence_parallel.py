"""Gradients of parameters that every tensor-parallel rank holds whole but applies to its own part of the sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def reduce_sequence_parallel_gradients(model: nn.Module, tp_group: dist.ProcessGroup) -> int:
    """Sum the gradients of `sequence_parallel` parameters over tensor-parallel ranks, from now on, as they arise.

    Nobody else does: Megatron-Core leaves it to its own distributed optimizer, DeepSpeed reduces over data parallelism
    only. Without it norms drift apart between ranks within a few steps while the losses still agree to four decimals.
    The hook runs before the gradient is accumulated, so every ZeRO stage sees the sum. It costs a collective for each parameter
    and micro-batch: `SequenceParallelBucket` is for optimizers that keep whole gradients.

    Args:
        model: its parameters carry `sequence_parallel=True` where that holds.
        tp_group: the tensor-parallel group.

    Returns:
        Number of parameters concerned.
    """
    if dist.get_world_size(tp_group) == 1:
        return 0

    def sum_over_tensor_parallel(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=tp_group)
        return gradient

    found = _concerned(model)
    for param in found:
        param.register_hook(sum_over_tensor_parallel)
    return len(found)


class SequenceParallelBucket:
    """The same once a step, in one collective, where DeepSpeed accumulates whole gradients: bf16 at ZeRO-1 (bf16_optimizer.py:143).

    There the sum over tensor-parallel ranks may come after that over micro-batches and data-parallel ranks.
    """

    def __init__(self, model: nn.Module, zero: Any, tp_group: dist.ProcessGroup) -> None:
        concerned = set(map(id, _concerned(model)))
        self._gradients = [
            gradient
            for parameters, gradients in zip(zero.bf16_groups, zero.fp32_groups_gradients, strict=True)
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if id(parameter) in concerned
        ]
        self._group = tp_group

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum over tensor-parallel ranks, in place. Collective; once for each step's gradients."""
        if not self._gradients:
            return
        bucket = torch.cat([gradient.reshape(-1) for gradient in self._gradients])
        dist.all_reduce(bucket, group=self._group)
        parts = bucket.split([gradient.numel() for gradient in self._gradients])
        torch._foreach_copy_(self._gradients, [x.view_as(g) for x, g in zip(parts, self._gradients)])


def keeps_whole_gradients(precision: str, zero_stage: int) -> bool:
    """Whether DeepSpeed keeps a whole float32 gradient of every parameter on every rank."""
    return precision == "bf16" and zero_stage == 1


def _concerned(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad and getattr(param, "sequence_parallel", False)]
