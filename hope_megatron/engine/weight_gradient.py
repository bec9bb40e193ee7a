"""Weight gradients of Megatron-Core's linears, added to DeepSpeed's float32 sums by the product that makes them.

Without it backward makes a bf16 gradient of each weight, which is raised to float32 and added after each micro-batch: three passes
over memory, a second copy of all gradients, and a rounding to bf16 that this leaves out.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn


def add_in_products(model: nn.Module, zero: Any) -> int:
    """Have the linears do so, from now on. `accumulate_together` comes first: it leaves alone what is in the sums already.

    Args:
        model: its linears are given `gradient_accumulation_fusion`, and their weights `main_grad`.
        zero: DeepSpeed's bf16 wrapper at ZeRO-1.

    Returns:
        Number of weights concerned.
    """
    sums = {
        id(parameter): total.view(parameter.shape)
        for group, totals in zip(zero.bf16_groups, zero.fp32_groups_gradients, strict=True)
        for parameter, total in zip(group, totals, strict=True)
    }
    fused = 0
    for layer in model.modules():
        if not isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
            continue
        weight = layer.weight  # None of a head that is tied to the embedding: its gradient goes the usual way
        layer.gradient_accumulation_fusion = weight is not None and id(weight) in sums
        if layer.gradient_accumulation_fusion and not hasattr(weight, "main_grad"):
            weight.main_grad = sums[id(weight)]
            fused += 1
    return fused
