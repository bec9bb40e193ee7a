"""Which data-parallel rank holds which elements of a parameter in ZeRO's flat vectors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """`numel` consecutive elements of a flattened TP shard, held by one data-parallel rank."""

    dp_rank: int
    flat_start: int
    shard_start: int
    numel: int


def split_runs(offset: int, numel: int, partition: int, dp_size: int) -> tuple[Run, ...]:
    """Runs of a parameter at `offset` of a group vector that is cut into `dp_size` equal partitions."""
    runs = []
    for rank in range(offset // partition, min(dp_size, (offset + numel - 1) // partition + 1)):
        low, high = max(offset, rank * partition), min(offset + numel, (rank + 1) * partition)
        runs.append(Run(rank, low - rank * partition, low - offset, high - low))
    return tuple(runs)


def partition_runs(offset: int, partition: int, numel: int, dp_size: int) -> tuple[Run, ...]:
    """ZeRO-3 cuts every parameter into equal partitions, the last ones padded; all ranks have the same offsets."""
    return tuple(
        Run(rank, offset, rank * partition, min(partition, numel - rank * partition))
        for rank in range(dp_size)
        if rank * partition < numel
    )
