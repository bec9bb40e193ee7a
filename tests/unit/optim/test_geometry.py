"""Shards, blocks and matrices: what is cut can be put together again, and is cut the way Megatron does it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hope_megatron.config.matrices.geometry import full_shape, matrix_blocks, matrix_shapes
from hope_megatron.optim.errors import OptimError
from hope_megatron.optim.geometry import merge_shards, split_shards
from hope_megatron.optim.tags import ParamTags

LAYOUTS = [
    ((12, 5), ParamTags()),
    ((12, 5), ParamTags(partition_dim=0)),
    ((12, 8), ParamTags(partition_dim=1)),
    ((12, 8), ParamTags(partition_dim=1, partition_stride=2)),
    ((12, 5), ParamTags(partition_dim=0, partition_stride=3)),
    ((12, 5), ParamTags(partition_dim=0, partition_stride=3, fused_parts=(4, 4, 4))),
    ((12, 5), ParamTags(partition_dim=0, partition_stride=2, fused_parts=(8, 4))),
    ((12, 5), ParamTags(partition_dim=0, fused_parts=(3, 9))),
    ((12, 8), ParamTags(partition_dim=1, fused_parts=(3, 9))),
    ((4, 3, 5), ParamTags(partition_dim=0)),
    ((2, 4, 3, 5), ParamTags(partition_dim=1)),
    ((3, 4, 6), ParamTags(partition_dim=1)),
    ((3, 4, 6), ParamTags(partition_dim=2)),
    ((6,), ParamTags(role="vector", partition_dim=0)),
]


@pytest.mark.parametrize(("shape", "tags"), LAYOUTS)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_merge_inverts_split(shape, tags, tp_size):
    full = torch.randn(shape)
    shards = split_shards(full, tags, tp_size)
    assert full_shape(shards[0].shape, tags, tp_size) == shape
    assert torch.equal(merge_shards(shards, tags), full)


@pytest.mark.parametrize(("shape", "tags"), [layout for layout in LAYOUTS if not layout[1].fused_parts])
def test_split_is_that_of_megatron(shape, tags):
    full = torch.randn(shape)
    for rank, shard in enumerate(split_shards(full, tags, 2)):
        if tags.partition_dim is not None:
            full_chunks = full.chunk(2 * tags.partition_stride, tags.partition_dim)
            assert torch.equal(shard, torch.cat(full_chunks[rank::2], tags.partition_dim))


@pytest.mark.parametrize(("shape", "tags"), [layout for layout in LAYOUTS if layout[1].role == "matrix"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_blocks_assemble_the_matrices(shape, tags, tp_size):
    """Copying every block of every shard to its place gives the full parameter's matrices, each element once."""
    full = torch.randn(shape)
    expected = list(full.split(list(tags.fused_parts))) if tags.fused_parts else list(full.reshape(-1, *shape[-2:]))
    shards = split_shards(full, tags, tp_size)
    assembled = [torch.full(s, float("nan")) for s in matrix_shapes(shards[0].shape, tags, tp_size)]
    for block in matrix_blocks(shards[0].shape, tags, tp_size):
        values = shards[block.tp_rank].flatten()[block.start : block.start + block.numel].view(block.rows, block.cols)
        rows = assembled[block.matrix][block.first_row : block.first_row + block.rows]
        for run in block.columns:
            target = rows[:, run.full : run.full + run.length]
            assert target.isnan().all()
            target.copy_(values[:, run.local : run.local + run.length])
    assert len(assembled) == len(expected)
    for found, wanted in zip(assembled, expected, strict=True):
        assert torch.equal(found, wanted)


@given(tp=st.integers(1, 4), parts=st.lists(st.integers(1, 5), min_size=1, max_size=4), cols=st.integers(1, 4))
def test_any_fused_sharding_round_trips(tp, parts, cols):
    sizes = tuple(tp * part for part in parts)
    tags = ParamTags(partition_dim=0, partition_stride=len(sizes), fused_parts=sizes)
    full = torch.randn(sum(sizes), cols)
    shards = split_shards(full, tags, tp)
    assert torch.equal(merge_shards(shards, tags), full)
    # every rank holds its slice of every part
    local = [part // tp for part in sizes]
    for rank, shard in enumerate(shards):
        for mine, whole in zip(shard.split(local), full.split(list(sizes)), strict=True):
            assert torch.equal(mine, whole.chunk(tp)[rank])


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(OptimError, match=r"7 in parts \[7\].*2 tensor-parallel ranks"):
        split_shards(torch.randn(7, 2), ParamTags(partition_dim=0), 2)
    with pytest.raises(OptimError, match="w: optim_fused_parts"):
        matrix_blocks((6, 2), ParamTags(fused_parts=(2, 3)), 1, "w")
