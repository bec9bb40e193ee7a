"""Which elements each rank of a layout keeps: the pieces that its ZeRO stage would write."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hope_megatron.convert.layout import Layout
from hope_megatron.convert.whole import WholeParameter
from hope_megatron.optim.geometry import shard_segments
from hope_megatron.optim.zero import Run, partition_runs, split_runs

_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor: partitions of a flat vector are multiples of this


def shard_shape(parameter: WholeParameter, tp_size: int) -> tuple[int, ...]:
    """Shape of one tensor-parallel shard."""
    shape, dim = list(parameter.shape), parameter.tags.partition_dim
    if dim is not None:
        segments = shard_segments(shape[dim], parameter.tags, tp_size, 0, parameter.name)
        shape[dim] = sum(segment.length for segment in segments)
    return tuple(shape)


def place(parameters: Iterable[WholeParameter], layout: Layout) -> dict[str, tuple[Run, ...]]:
    """Runs of every parameter's flattened shard over the data-parallel ranks.

    They are the pieces that training in this layout writes, so that a rank finds what it needs in its own file.
    """
    shards = {p.name: (p, torch.Size(shard_shape(p, layout.tensor_parallel)).numel()) for p in parameters}
    dp_size = layout.data_parallel
    if layout.zero_stage == 0:
        return {name: (Run(0, 0, 0, numel),) for name, (_, numel) in shards.items()}
    if layout.zero_stage == 3:  # every parameter is cut into equal partitions
        return {name: partition_runs(0, -(-numel // dp_size), numel, dp_size) for name, (_, numel) in shards.items()}
    placed: dict[str, tuple[Run, ...]] = {}
    for group in _groups(shards.values()):  # every group is one vector, cut into equal partitions
        total, offset = sum(numel for _, numel in group), 0
        partition = -(-total // (_ALIGNMENT * dp_size)) * _ALIGNMENT
        for parameter, numel in group:
            placed[parameter.name] = split_runs(offset, numel, partition, dp_size)
            offset += numel
    return placed


def _groups(shards: Iterable[tuple[WholeParameter, int]]) -> list[list[tuple[WholeParameter, int]]]:
    """Parameters as `build_param_groups` groups them."""
    groups: dict[str, list[tuple[WholeParameter, int]]] = {}
    for parameter, numel in shards:
        groups.setdefault(parameter.tags.group_name, []).append((parameter, numel))
    return list(groups.values())
