"""Learning-rate schedules at their corners."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hope_megatron.optim import OptimError, apply_lr, lr_at


def cfg(schedule: str, **changes):
    base = {"warmup_steps": 10, "total_steps": 100, "decay_steps": 20, "min_lr_ratio": 0.1}
    return SimpleNamespace(schedule=schedule, **{**base, **changes})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    assert [lr_at(step, cfg(schedule)) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]


def test_ends():
    assert lr_at(99, cfg("cosine")) == pytest.approx(0.1)
    assert lr_at(99, cfg("linear")) == pytest.approx(0.1)
    assert lr_at(99, cfg("wsd")) == pytest.approx(0.1)
    assert lr_at(99, cfg("constant")) == 1.0
    assert lr_at(10_000, cfg("cosine")) == pytest.approx(0.1)


def test_middle():
    assert lr_at(54, cfg("cosine")) == pytest.approx(0.55)
    assert lr_at(54, cfg("linear")) == pytest.approx(0.55)
    assert [lr_at(step, cfg("wsd")) for step in (10, 79)] == [1.0, 1.0]
    assert lr_at(89, cfg("wsd")) == pytest.approx(0.55)


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    step=st.integers(0, 300),
    warmup=st.integers(0, 50),
    total=st.integers(1, 200),
    decay=st.integers(0, 100),
    ratio=st.floats(0, 1),
)
def test_always_between_zero_and_one_and_falling_after_warm_up(schedule, step, warmup, total, decay, ratio):
    c = cfg(schedule, warmup_steps=warmup, total_steps=total, decay_steps=decay, min_lr_ratio=ratio)
    now, later = lr_at(step, c), lr_at(step + 1, c)
    assert 0 <= now <= 1
    if step >= warmup:
        assert later <= now + 1e-12


def test_unknown_schedule_is_refused():
    with pytest.raises(OptimError, match="exponential"):
        lr_at(0, cfg("exponential"))


def test_apply_lr_scales_every_group_from_its_base():
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.2, "base_lr": 0.2}
    optimizer = torch.optim.SGD([group])
    apply_lr(optimizer, 0.5)
    apply_lr(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.1
