"""Tensors from their tensor-parallel shards, and back. Where elements lie is known to `config.matrices.geometry`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hope_megatron.config.matrices.geometry import full_shape, shard_runs
from hope_megatron.config.matrices.tags import ParamTags


def merge_shards(shards: Sequence[Tensor], tags: ParamTags) -> Tensor:
    """The full tensor from the shards of all TP ranks, in rank order. A replicated parameter gives the first."""
    if tags.partition_dim is None or len(shards) == 1:
        return shards[0]
    dim = tags.partition_dim
    full = shards[0].new_empty(full_shape(shards[0].shape, tags, len(shards)))
    for rank, shard in enumerate(shards):
        for run in shard_runs(full.shape[dim], tags, len(shards), rank):
            full.narrow(dim, run.full, run.length).copy_(shard.narrow(dim, run.local, run.length))
    return full


def split_shards(full: Tensor, tags: ParamTags, tp_size: int) -> list[Tensor]:
    """The shards of a full tensor, one per TP rank: the inverse of `merge_shards`."""
    if tags.partition_dim is None or tp_size == 1:
        return [full] * tp_size
    dim = tags.partition_dim
    return [
        torch.cat(
            [full.narrow(dim, run.full, run.length) for run in shard_runs(full.shape[dim], tags, tp_size, rank)],
            dim=dim,
        )
        for rank in range(tp_size)
    ]
