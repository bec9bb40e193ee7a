"""Which elements each rank of a layout keeps, and where: the flat vectors that its ZeRO stage makes of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hope_megatron.checkpoint.unsharded import UnshardedParameter
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.config.matrices.geometry import shard_runs
from hope_megatron.config.matrices.runs import Run, partition_runs, split_runs

_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor: partitions of a flat vector are multiples of this
_SUB_GROUP_NUMEL = 1_000_000_000  # DeepSpeed's default sub_group_size: at stage 3 a rank begins a new vector there


@dataclass(frozen=True)
class FlatVector:
    """What ZeRO hands to the optimizer: of each data-parallel rank one vector of `numel` elements.

    Attributes:
        group: name of the parameter group it belongs to.
        numel: with what aligns the partitions.
        runs: elements of every parameter's flattened shard, in the vector's order.
    """

    group: str
    numel: int
    runs: Mapping[str, tuple[Run, ...]]

    @property
    def num_used(self) -> int:
        """Elements of all ranks' vectors that belong to a parameter."""
        return sum(run.numel for runs in self.runs.values() for run in runs)


def shard_shape(parameter: UnshardedParameter, tp_size: int) -> tuple[int, ...]:
    """Shape of one tensor-parallel shard."""
    shape, dim = list(parameter.shape), parameter.tags.partition_dim
    if dim is not None:
        runs = shard_runs(shape[dim], parameter.tags, tp_size, 0, parameter.name)
        shape[dim] = sum(run.length for run in runs)
    return tuple(shape)


def place(
    parameters: Mapping[str, UnshardedParameter], members: Mapping[str, Sequence[str]], layout: ParallelLayout
) -> dict[str, tuple[Run, ...]]:
    """Runs of every parameter's flattened shard over the data-parallel ranks.

    They are the pieces that training in this layout writes, so that a rank finds what it needs in its own file.
    """
    if layout.zero_stage == 0:
        return {name: (Run(0, 0, 0, _shard_numel(p, layout)),) for name, p in parameters.items()}
    vectors = flat_vectors(parameters, members, layout)
    return {name: runs for vector in vectors for name, runs in vector.runs.items()}


def flat_vectors(
    parameters: Mapping[str, UnshardedParameter], members: Mapping[str, Sequence[str]], layout: ParallelLayout
) -> list[FlatVector]:
    """The vectors of ZeRO 1, 2 or 3, in the order of the optimizer.

    Args:
        parameters: by name.
        members: names of the parameters of each group (see `Skeleton`).
        layout: of stage 1 or more.
    """
    split = _equal_partitions if layout.zero_stage == 3 else _one_vector
    vectors: list[FlatVector] = []
    for group, names in members.items():
        numels = {name: _shard_numel(parameters[name], layout) for name in names}
        vectors += split(group, numels, layout.data_parallel)
    return vectors


def _shard_numel(parameter: UnshardedParameter, layout: ParallelLayout) -> int:
    return torch.Size(shard_shape(parameter, layout.tensor_parallel)).numel()


def _one_vector(group: str, numels: Mapping[str, int], dp_size: int) -> list[FlatVector]:
    """ZeRO 1 and 2: a group's parameters end to end, cut into equal partitions."""
    partition = -(-sum(numels.values()) // (_ALIGNMENT * dp_size)) * _ALIGNMENT
    runs, offset = {}, 0
    for name, numel in numels.items():
        runs[name] = split_runs(offset, numel, partition, dp_size)
        offset += numel
    return [FlatVector(group, partition, runs)]


def _equal_partitions(group: str, numels: Mapping[str, int], dp_size: int) -> Iterator[FlatVector]:
    """ZeRO 3: every parameter is cut into equal partitions; a rank's lie end to end."""
    runs: dict[str, tuple[Run, ...]] = {}
    offset = 0
    for name, numel in numels.items():
        partition = -(-numel // dp_size)
        runs[name] = partition_runs(offset, partition, numel, dp_size)
        offset += partition
        if offset >= _SUB_GROUP_NUMEL:
            yield FlatVector(group, offset, runs)
            runs, offset = {}, 0
    if runs:
        yield FlatVector(group, offset, runs)
