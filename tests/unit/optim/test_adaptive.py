"""The adaptive update period: what agreement means, its bounds, and what does not go together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hope_megatron.config.model import AdaptivePeriod, CMSConfig, CMSLevelConfig
from hope_megatron.optim import build_optimizer
from hope_megatron.optim.adaptive import adapt_periods, next_period
from hope_megatron.testing.tiny import tiny_run_config

RULE = AdaptivePeriod(shortest=2, longest=8, halve_above=0.5, double_below=0.0)


@pytest.mark.parametrize(
    ("period", "agreement", "following"),
    [(4, 0.6, 2), (2, 0.6, 2), (4, 0.5, 4), (4, 0.0, 4), (4, -0.1, 8), (8, -0.1, 8), (5, -0.1, 8), (3, 0.9, 2)],
)
def test_next_period(period, agreement, following):
    assert next_period(period, agreement, RULE) == following


def follow(directions: list[float]) -> tuple[tuple[tuple[int, int], ...], list[float]]:
    """Changes of the period of one matrix whose gradient at step t is directions[t] times a constant, and what was measured."""
    w = torch.nn.Parameter(torch.ones(3, 4))
    w.update_period_steps, w.adaptive_level = 4, 2
    settings = SimpleNamespace(name="sgd", lr=0.01, vector_lr=None, weight_decay=0.0, momentum=0.5, nesterov=False)
    optimizer = build_optimizer([("w", w)], settings)
    measured = []
    for direction in directions:
        w.grad = torch.full_like(w, direction)
        optimizer.step()
        measured += [
            value for name, value in adapt_periods(optimizer, {2: RULE}).items() if name == "cms/agreement/level_2"
        ]
    return optimizer.param_groups[0]["update_period_changes"], measured


def test_agreeing_gradients_shorten_the_period_and_others_lengthen_it():
    changes, measured = follow([1.0] * 12)
    assert changes == ((8, 2),) and measured == pytest.approx([1.0] * 3)  # at 8, 10, 12; at 4 there is no momentum yet
    changes, measured = follow([1.0] * 4 + [-1.0] * 12)
    assert changes == ((8, 8), (16, 4))
    assert measured == pytest.approx([-1.0, 1.0])  # the second, at 16, agrees with a momentum that has turned


def test_what_does_not_go_together():
    changes = [{"from_step": 4, "period": 2}]
    with pytest.raises(ValueError, match="keep one of them"):
        CMSLevelConfig(hidden_size=8, update_period_steps=4, update_period_changes=changes, update_period_adaptive=RULE)
    with pytest.raises(ValueError, match="shortest <= update_period_steps <= longest"):
        CMSLevelConfig(hidden_size=8, update_period_steps=16, update_period_adaptive=RULE)
    levels = CMSConfig(levels=(CMSLevelConfig(hidden_size=8, update_period_steps=4, update_period_adaptive=RULE),))
    with pytest.raises(ValueError, match=r"optim\.name=dmgd does not keep"):
        tiny_run_config(cms=levels, optim={"name": "dmgd"})
