"""Rotary embeddings, held against Megatron-Core's."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.ops.rotary import RotaryTable, rotate
from hope_megatron.parallel.distributed import init_distributed

DIM, BASE = 16, 500_000.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 5])
def test_equals_megatrons_bit_for_bit(dtype: torch.dtype, first: int) -> None:
    init_distributed(ParallelConfig())
    theirs = RotaryEmbedding(DIM, rotary_percent=1.0, rotary_base=BASE, use_cpu_initialization=True)
    x = torch.randn(7, 2, 3, DIM, dtype=dtype, requires_grad=True)
    expected = _apply_rotary_pos_emb_bshd(x, theirs(7, offset=first))
    found = rotate(x, *RotaryTable(DIM, BASE).rows(first, 7, x))
    assert torch.equal(found, expected)
    dy = torch.randn_like(found)
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (found, expected)))


def test_table_grows_and_keeps_its_rows() -> None:
    table, like = RotaryTable(DIM, BASE), torch.empty(0)
    early = table.rows(2, 3, like)
    for first in range(5, 40):  # as a generation asks, token after token
        table.rows(first, 1, like)
    assert all(map(torch.equal, table.rows(2, 3, like), early))
    assert len({table.rows(n, 1, like)[0].untyped_storage().data_ptr() for n in range(40)}) == 1


def test_table_follows_dtype() -> None:
    table = RotaryTable(DIM, BASE)
    assert table.rows(0, 4, torch.empty(0))[0].dtype == torch.float32
    assert table.rows(0, 4, torch.empty(0, dtype=torch.bfloat16))[1].dtype == torch.bfloat16
