"""Parameters that FSDP2 has sharded: where the rows of a DTensor lie, in the words of the exchange plan."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from hope_megatron.config.matrices.runs import Run
from hope_megatron.optim.errors import UnboundShardError


class RowShard(NamedTuple):
    """This rank's rows of a parameter."""

    group: Any
    """Process group over which the rows are spread."""
    rank: int
    runs: tuple[Run, ...]
    """Those of all ranks of the group."""


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part; a plain tensor is whole. Shares memory."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[operator]


def row_shard(param: nn.Parameter, name: str) -> RowShard | None:
    """How a parameter is spread over ranks; None if this rank has all of it.

    Raises:
        UnboundShardError: it is spread in another way than over its first dimension, once.
    """
    if not _is_dtensor(param):
        return None
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    cut = [dim for dim, placement in enumerate(placements) if type(placement) is not Replicate]
    if not cut:
        return None
    if len(cut) > 1 or type(placements[cut[0]]) is not Shard or placements[cut[0]].dim != 0:
        raise UnboundShardError(
            f"{name} is placed as {placements}; optimizers here take DTensors sharded over dim 0 of one mesh axis, as "
            "torch.distributed.fsdp.fully_shard makes them, replicated over the others"
        )
    group = mesh.get_group(cut[0])
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    rows, per_row = param.shape[0], math.prod(param.shape[1:])
    most = -(-rows // size)  # as torch.chunk cuts
    runs = []
    for place in range(size):
        first, end = min(rows, place * most), min(rows, (place + 1) * most)
        if end > first:
            runs.append(Run(place, 0, first * per_row, (end - first) * per_row))
    held = sum(run.numel for run in runs if run.dp_rank == rank)
    if local_tensor(param).numel() != held:
        raise UnboundShardError(
            f"{name}: this rank holds {local_tensor(param).numel()} elements, not {held}, of its rows"
        )
    return RowShard(group, rank, tuple(runs))


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")
