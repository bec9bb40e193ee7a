"""Megatron-Core's parallel linear layers, declared our way."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hope_megatron.layers.parameters import Initializer, constant, declare


def enter_parallel_region(x: Tensor, config: TransformerConfig) -> Tensor:
    """Input of several column-parallel layers at once: gathered from the sequence shards [T/tp, B, D] -> [T, B, D] under
    sequence parallelism. Backward sums over tensor-parallel ranks, once for all of them."""
    if config.sequence_parallel:
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)
    x = copy_to_tensor_model_parallel_region(x)
    if x.requires_grad:
        x.register_hook(
            torch.Tensor.contiguous
        )  # Megatron-Core's sum in backward gets lost where the gradient is strided
    return x


def leave_parallel_region(y: Tensor, config: TransformerConfig) -> Tensor:
    """Output [T, B, D] of this rank's part of a row-parallel product: summed over tensor-parallel ranks, and scattered along
    the sequence under sequence parallelism."""
    if config.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(y)
    return reduce_from_tensor_model_parallel_region(y.contiguous())  # its sum of a strided tensor would get lost


def linear_per_context(x: Tensor, weight: Tensor) -> Tensor:
    """y = x W^T with a matrix of its own for each context: x [T, B, in], weight [B, out, in] -> [T, B, out]."""
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


class _GatheredColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel layer whose input has been through `enter_parallel_region`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, disable_grad_reduce=True, **kwargs)
        self.sequence_parallel = False
        self.allreduce_dgrad = False


def column_parallel(
    input_size: int,
    output_size: int,
    config: TransformerConfig,
    init: Initializer,
    *,
    blocks: int = 1,
    bias_init: Initializer | None = None,
    role: str = "matrix",
    fused_apart: bool = False,
    allocate: bool = True,
    width_fan_in: bool = True,
) -> ColumnParallelLinear:
    """y = x W^T, output features split over ranks; for inputs that went through `enter_parallel_region`.

    Args:
        blocks: equal fused parts of the output; a rank holds its share of each part.
        bias_init: adds a bias, returned beside the output (not added), filled by this.
        role: "matrix" or "vector" for the optimizer.
        fused_apart: the blocks are matrices of their own to the optimizer.
        allocate: False for a layer that is given its weight at each call (tied embeddings).
        width_fan_in: False for the output head, before which muP divides instead.
    """
    layer = _GatheredColumnParallelLinear(
        input_size,
        output_size,
        config=config,
        init_method=None,
        bias=bias_init is not None,
        skip_bias_add=True,
        stride=blocks,
        skip_weight_param_allocation=not allocate,
    )
    if not allocate:
        return layer
    parts = (output_size // blocks,) * blocks if fused_apart and blocks > 1 else ()
    declare(
        layer.weight,
        init,
        shard_dim=0,
        stride=blocks,
        role=role,
        weight_decay=role == "matrix",
        fused_parts=parts,
        width_fan_in=width_fan_in,
    )
    if bias_init is not None:
        declare(layer.bias, bias_init, shard_dim=0, stride=blocks)
    return layer


def row_parallel(input_size: int, output_size: int, config: TransformerConfig, init: Initializer) -> RowParallelLinear:
    """y = x W^T, input features split over ranks; the output is summed (and scattered along the sequence under SP)."""
    layer = RowParallelLinear(
        input_size, output_size, config=config, init_method=None, bias=False, input_is_parallel=True, skip_bias_add=True
    )
    declare(layer.weight, init, shard_dim=1, role="matrix", weight_decay=True, width_fan_in=True)
    return layer


zeros = constant(0.0)
ones = constant(1.0)
