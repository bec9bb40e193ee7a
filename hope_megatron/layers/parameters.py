"""What a layer says about each of its parameters: sharding, initial value, and how the optimizer treats it.

The statements are attributes of the parameter, as in Megatron-Core, so that optimizers and checkpoints need no module classes:

    tensor_model_parallel, partition_dim, partition_stride   Megatron-Core's own
    sequence_parallel      replicated over tensor parallelism, but each rank sees other tokens or heads: sum gradients
    optim_role             "matrix" (or a stack of matrices) or "vector"
    optim_fused_parts      row counts of the full tensor's parts that are matrices of their own (q, k, v)
    no_weight_decay        leave out of weight decay
    update_period_steps    the clock of a continuum memory level, in optimizer steps
    width_fan_in           its fan-in grows with the width of the model: muP scales its learning rate
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

Initializer = Callable[[Tensor, torch.Generator], object]


def normal(std: float) -> Initializer:
    """N(0, std^2)."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def constant(value: float) -> Initializer:
    """The same value everywhere."""
    return lambda tensor, generator: tensor.fill_(value)


def rows(values: list[float]) -> Initializer:
    """The first dim is cut into len(values) equal parts; part i is filled with values[i]."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        for part, value in zip(tensor.chunk(len(values)), values, strict=True):
            part.fill_(value)

    return fill


def slices(fills: list[Initializer], dim: int) -> Initializer:
    """Slice i along `dim` is filled by fills[i]."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        for part, initializer in zip(tensor.unbind(dim), fills, strict=True):
            values = torch.empty(part.shape)
            initializer(values, generator)
            part.copy_(values)

    return fill


def declare(
    parameter: nn.Parameter,
    init: Initializer,
    *,
    shard_dim: int | None = None,
    stride: int = 1,
    sum_over_tp: bool = False,
    role: str = "vector",
    weight_decay: bool = False,
    fused_parts: tuple[int, ...] = (),
    width_fan_in: bool = False,
) -> nn.Parameter:
    """Attach a layer's statements to `parameter`; see the module docstring.

    Args:
        init: fills the full (unsharded) float32 tensor.
        shard_dim: dim split over tensor parallelism, None if replicated.
        stride: number of fused blocks along shard_dim; a rank holds its part of each block, blocks one after another.
        sum_over_tp: replicated, but its gradient is a sum over tensor-parallel ranks.
    """
    parameter.tensor_model_parallel = shard_dim is not None
    parameter.partition_dim = -1 if shard_dim is None else shard_dim
    parameter.partition_stride = stride
    parameter.sequence_parallel = sum_over_tp
    parameter.optim_role = role
    parameter.optim_fused_parts = fused_parts
    parameter.no_weight_decay = not weight_decay
    parameter.width_fan_in = width_fan_in
    parameter.initializer = init
    return parameter


def shard(full: Tensor, dim: int, stride: int, rank: int, size: int) -> Tensor:
    """This rank's part of a full tensor, in Megatron-Core's strided layout."""
    if size == 1:
        return full
    return torch.cat(full.chunk(stride * size, dim)[rank::size], dim)


@torch.no_grad()
def initialize_parameters(module: nn.Module, seed: int) -> None:
    """Fill every declared parameter from its own generator, keyed by (seed, name): the full model has the same initial
    weights whatever the tensor-parallel size or the order of construction."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in module.named_parameters():
        if not hasattr(parameter, "initializer"):
            raise RuntimeError(f"parameter {name} was never declared: its layer must call declare()")
        shape, dim = list(parameter.shape), parameter.partition_dim
        if parameter.tensor_model_parallel:
            shape[dim] *= size
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        full = torch.empty(shape, dtype=torch.float32)
        parameter.initializer(full, torch.Generator().manual_seed(int.from_bytes(key[:8], "little") % 2**63))
        if parameter.tensor_model_parallel:
            full = shard(full, dim, parameter.partition_stride, rank, size)
        parameter.copy_(full)
