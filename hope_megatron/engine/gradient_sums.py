"""The float32 sums of gradients that DeepSpeed's bf16 wrapper keeps at ZeRO-1."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from hope_megatron.config.matrices.layout import SUMMED_NUMEL, in_portions


@torch.no_grad()
def add_to_sums(zero: Any, group: int, members: Sequence[int]) -> None:
    """Add the gradients of some parameters to their sums, many at a time, and drop them.

    Args:
        zero: the wrapper.
        group: its parameter group.
        members: numbers of the parameters in it.
    """
    parameters, sums = zero.bf16_groups[group], zero.fp32_groups_gradients[group]
    for i in members:
        in_sum = hasattr(parameters[i], "main_grad")  # weight_gradient.py; what autograd made is a stand-in at most
        if in_sum:
            parameters[i].grad = None
        if in_sum or parameters[i].grad is not None:
            parameters[i]._hp_grad, zero.fp32_groups_has_gradients[group][i] = sums[i], True
    found = [i for i in members if parameters[i].grad is not None]
    numbers = iter(found)
    for sizes in in_portions([sums[i].numel() for i in found], SUMMED_NUMEL):
        some = list(itertools.islice(numbers, len(sizes)))
        raised = [torch.empty_like(sums[i]) for i in some]
        torch._foreach_copy_(raised, [parameters[i].grad.view(sums[i].shape) for i in some])
        torch._foreach_add_([sums[i] for i in some], raised)
    for i in found:
        parameters[i].grad = None
