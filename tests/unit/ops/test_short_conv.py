"""The short convolution keeps no more than it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hope_megatron.ops.short_conv import short_conv


@pytest.mark.parametrize("T", [1, 2, 3, 9])
def test_equals_pytorchs_convolution(T: int) -> None:
    x, weight = torch.randn(2, T, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    y, _ = short_conv(x, weight)
    expected = F.conv1d(F.pad(x.mT, (3, 0)), weight.unsqueeze(1), groups=6).mT
    torch.testing.assert_close(y, F.silu(expected))


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_goes_on_where_it_stopped(cut: int) -> None:
    x, weight = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    whole, end = short_conv(x, weight)
    first, tail = short_conv(x[:, :cut], weight)
    second, tail = short_conv(x[:, cut:], weight, tail)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(tail, end)


@pytest.mark.parametrize("T", [1, 9])
def test_tail_holds_no_more_than_itself(T: int) -> None:
    _, tail = short_conv(torch.randn(2, T, 6), torch.randn(6, 4))
    assert tail.untyped_storage().nbytes() == tail.numel() * tail.element_size()
