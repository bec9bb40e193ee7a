"""The bound of the inner rate, against the descent that it is about."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.config.descent import largest_stable_step
from hope_megatron.ops.memory import Bank, MemoryParams, MemoryRule, RateLogits, memory_chunked

CHUNKS = 400


def error_left(chunk: int, momentum: float, rate: float) -> float:
    """What is left of a matrix memory's error after many chunks of one key and one value: the operator itself, in float64."""
    rule = MemoryRule(
        chunk, num_layers=1, objective="l2", dgd_layers="none", own_targets=False, adaptive_key=False, adaptive_value=False,
        adaptive_eta=False, adaptive_alpha=False, eta_max=rate, momentum_max=0.95,
    )  # fmt: skip
    key = torch.eye(2, dtype=torch.float64)[0].expand(1, chunk * CHUNKS, 1, 2)
    theta = torch.full((1, chunk * CHUNKS, 1), momentum / 0.95, dtype=torch.float64).logit()
    bank = Bank(None, torch.zeros(1, 1, 2, 2, dtype=torch.float64))
    y, _ = memory_chunked(key, key, key, RateLogits(theta=theta), MemoryParams(bank), rule)
    return (y - key)[:, -chunk:].norm().item()


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("momentum", [0.05, 0.5, 0.6, 0.8, 0.9])
def test_below_the_bound_the_error_goes_away(chunk, momentum):
    assert error_left(chunk, momentum, 0.9 * largest_stable_step(chunk, momentum)) < 1e-2


@pytest.mark.parametrize(("chunk", "momentum"), [(1, 1e-9), (4, 0.9), (16, 0.5), (16, 0.8), (16, 0.9), (64, 0.9)])
def test_above_the_bound_it_grows(chunk, momentum):
    """Where the largest momentum is the worst one; else the bound is another's."""
    assert error_left(chunk, momentum, 1.1 * largest_stable_step(chunk, momentum)) > 10


def test_known_bounds():
    assert largest_stable_step(32, 0.0) == pytest.approx(2 / 32)  # gradient descent of length 32 eta
    assert largest_stable_step(1, 0.9) == pytest.approx(2.0)  # the heavy ball never needs less than descent does
