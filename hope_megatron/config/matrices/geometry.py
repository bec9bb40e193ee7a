"""Where the elements of a tensor-parallel shard lie in the full matrices, and back.

Legend: a *shard* is one TP rank's tensor; a *matrix* is what Newton-Schulz sees: the full parameter, one entry of a
stack, or one fused part. A *block* is the intersection of a matrix with a shard; it is contiguous in the row-major
shard, and its columns are the shard's columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hope_megatron.config.matrices.errors import OptimError
from hope_megatron.config.matrices.tags import ParamTags


@dataclass(frozen=True)
class IndexRun:
    """`length` consecutive indices of a dimension: from `local` in the shard, from `full` in the whole."""

    local: int
    full: int
    length: int


@dataclass(frozen=True)
class Block:
    """Rows of one matrix that one TP shard holds: `rows` x `cols` elements from `start` of the flattened shard."""

    matrix: int
    tp_rank: int
    start: int
    rows: int
    cols: int
    first_row: int
    """Row of the matrix where the block begins."""
    columns: tuple[IndexRun, ...]
    """Where the columns of the shard lie in the matrix."""

    @property
    def numel(self) -> int:
        return self.rows * self.cols


def full_shape(shape: Sequence[int], tags: ParamTags, tp_size: int) -> tuple[int, ...]:
    """Shape of the full parameter from that of a shard."""
    full = list(shape)
    if tags.partition_dim is not None:
        full[tags.partition_dim] *= tp_size
    return tuple(full)


def shard_runs(full_size: int, tags: ParamTags, tp_size: int, tp_rank: int, name: str = "parameter") -> list[IndexRun]:
    """Runs of indices of the sharded dimension on one TP rank.

    The dimension is a row of parts, of which every rank holds its 1/tp slice, one after the other: `partition_stride`
    equal parts, or the `optim_fused_parts` if they run along the same dimension and are as many as the stride says.
    """
    parts = [full_size // tags.partition_stride] * tags.partition_stride
    if tags.partition_dim == 0 and len(tags.fused_parts) == tags.partition_stride > 1:
        parts = list(tags.fused_parts)
    if sum(parts) != full_size or any(size % tp_size for size in parts):
        raise OptimError(
            f"{name}: size {full_size} in parts {parts} (partition_stride {tags.partition_stride}) does not "
            f"divide over {tp_size} tensor-parallel ranks"
        )
    runs, local, full = [], 0, 0
    for size in parts:
        slice_size = size // tp_size
        runs.append(IndexRun(local, full + tp_rank * slice_size, slice_size))
        local, full = local + slice_size, full + size
    return runs


def matrix_shapes(shape: Sequence[int], tags: ParamTags, tp_size: int) -> list[tuple[int, int]]:
    """Shapes of the full matrices of a parameter whose TP shard has this shape."""
    *lead, rows, cols = full_shape(shape, tags, tp_size)
    if tags.fused_parts:
        return [(size, cols) for size in tags.fused_parts]
    return [(rows, cols)] * math.prod(lead)


def matrix_blocks(shape: Sequence[int], tags: ParamTags, tp_size: int, name: str = "parameter") -> list[Block]:
    """All blocks of a parameter over all TP ranks. A replicated parameter has the blocks of rank 0 only."""
    full = full_shape(shape, tags, tp_size)
    if tags.fused_parts and sum(tags.fused_parts) != full[0]:
        raise OptimError(
            f"{name}: optim_fused_parts {tags.fused_parts} do not add up to the full size {full[0]} of dim 0"
        )
    ranks = range(tp_size) if tags.partition_dim is not None else range(1)
    return [block for rank in ranks for block in _rank_blocks(shape, full, tags, tp_size, rank, name)]


def _rank_blocks(
    shape: Sequence[int], full: tuple[int, ...], tags: ParamTags, tp_size: int, tp_rank: int, name: str
) -> list[Block]:
    def runs(dim: int) -> list[IndexRun]:
        if dim == tags.partition_dim:
            return shard_runs(full[dim], tags, tp_size, tp_rank, name)
        return [IndexRun(0, 0, shape[dim])]

    lead, cols = len(shape) - 2, shape[-1]
    columns = tuple(runs(lead + 1))
    row_runs = _split_at_parts(runs(lead), tags.fused_parts)
    matrix_numel = shape[-2] * cols
    blocks = []
    for index, matrix in enumerate(_stack_indices(shape, full, runs)):
        for part, first_row, run in row_runs:
            start = index * matrix_numel + run.local * cols
            blocks.append(Block(matrix + part, tp_rank, start, run.length, cols, first_row, columns))
    return blocks


def _split_at_parts(runs: list[IndexRun], parts: tuple[int, ...]) -> list[tuple[int, int, IndexRun]]:
    """Cut row segments where fused parts meet: (part, first row inside the part, segment)."""
    if not parts:
        return [(0, run.full, run) for run in runs]
    cut = []
    for run in runs:
        begin = 0
        for part, size in enumerate(parts):
            low, high = max(run.full, begin), min(run.full + run.length, begin + size)
            if low < high:
                cut.append((part, low - begin, IndexRun(run.local + low - run.full, low, high - low)))
            begin += size
    return cut


def _stack_indices(shape: Sequence[int], full: tuple[int, ...], runs) -> list[int]:
    """Index in the full stack of each matrix of the shard's stack, in row-major order."""
    indices = [0]
    for dim in range(len(shape) - 2):
        positions = [run.full + i for run in runs(dim) for i in range(run.length)]
        indices = [i * full[dim] + position for i in indices for position in positions]
    return indices
