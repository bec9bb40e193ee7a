"""Cross entropy without a float32 copy of the logits, held against Megatron-Core's."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor

from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.model import loss as loss_module
from hope_megatron.model.loss import IGNORE, vocab_parallel_losses
from hope_megatron.parallel.distributed import init_distributed

T, B, V, VALID = 5, 3, 64, 61


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(VALID, (T, B), generator=generator)
    targets[2, 1] = targets[4, 0] = IGNORE
    return 4 * torch.randn(T, B, V, generator=generator), targets


def ours(logits: Tensor, targets: Tensor) -> Tensor:
    mesh = init_distributed(ParallelConfig())
    return vocab_parallel_losses(logits, targets, first=0, num_valid=VALID, group=mesh.tp_group)


def megatrons(logits: Tensor, targets: Tensor) -> Tensor:
    init_distributed(ParallelConfig())
    logits = logits.masked_fill(torch.arange(V) >= VALID, torch.finfo(logits.dtype).min)
    return vocab_parallel_cross_entropy(logits.float(), targets.contiguous()) * (targets != IGNORE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_at_once", [1, 4, 1000])
def test_equals_megatrons_bit_for_bit(batch, dtype, rows_at_once, monkeypatch) -> None:
    monkeypatch.setattr(loss_module, "_ROWS_NUMEL_CPU", rows_at_once * V)
    found = []
    for losses in (ours, megatrons):
        leaf = batch[0].to(dtype).requires_grad_()
        value = losses(leaf * 1, batch[1])  # a copy, for both overwrite it
        (value * torch.arange(T * B).view(T, B)).sum().backward()
        found.append((value, leaf.grad))
    assert all(map(torch.equal, *found))


def test_equals_pytorchs(batch) -> None:
    logits, targets = batch[0].double(), batch[1]
    expected = torch.nn.functional.cross_entropy(
        logits[..., :VALID].flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    torch.testing.assert_close(ours(logits.float(), targets).flatten().double(), expected, rtol=1e-6, atol=1e-6)


def test_backward_makes_no_copy_and_cannot_be_repeated(batch) -> None:
    leaf = batch[0].requires_grad_()
    logits = leaf * 1
    logits.retain_grad()
    total = ours(logits, batch[1]).sum()
    total.backward(retain_graph=True)
    assert torch.equal(logits.detach(), logits.grad)  # the gradient lies where the logits were
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
