"""Gradients of parameters that every tensor-parallel rank holds whole but applies to its own part of the sequence."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def reduce_sequence_parallel_gradients(model: nn.Module, tp_group: dist.ProcessGroup) -> int:
    """Sum the gradients of `sequence_parallel` parameters over tensor-parallel ranks, from now on, as they arise.

    Nobody else does: Megatron-Core leaves it to its own distributed optimizer, DeepSpeed reduces over data parallelism
    only. Without it norms drift apart between ranks within a few steps while the losses still agree to four decimals.
    The hook runs before the gradient is accumulated, so every ZeRO stage sees the sum.

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

    found = [
        param for param in model.parameters() if param.requires_grad and getattr(param, "sequence_parallel", False)
    ]
    for param in found:
        param.register_hook(sum_over_tensor_parallel)
    return len(found)
