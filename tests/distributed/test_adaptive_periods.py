"""Adaptive update periods: the same decisions in any layout, and the same bits after a resume in mid-period."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hope_megatron.config.model import AdaptivePeriod, CMSConfig, CMSLevelConfig
from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.testing.training import advance, build

pytestmark = pytest.mark.distributed

STEPS, SAVED = 16, 9
LAYOUTS = {"tp2 zero1": {"tp": 2, "zero_stage": 1}, "dp2 zero1": {"zero_stage": 1}}


def config(**layout):
    rule = AdaptivePeriod(longest=4, halve_above=0.05, double_below=-0.01)
    levels = (
        CMSLevelConfig(hidden_size=32),
        CMSLevelConfig(hidden_size=16, update_period_steps=2, update_period_adaptive=rule),
    )
    return tiny_run_config(cms=CMSConfig(levels=levels), training={"steps": STEPS}, optim={"name": "adamw"}, **layout)


def figures(engine):
    """Changes of the adaptive level's period, which all its groups share, and the weights of this rank."""
    (changes,) = {group["update_period_changes"] for group in engine.optimizer.param_groups if group["adaptive_level"]}
    return changes, {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def train(rank, world_size, directory, layouts):
    from hope_megatron.checkpoint.checkpointer import Checkpointer
    from hope_megatron.training.state import TrainingState

    found = {}
    for name, layout in layouts.items():
        run, state = config(**layout), TrainingState()
        engine = build(run)
        losses = advance(engine, run, state, SAVED)
        saver = Checkpointer(engine, Path(directory) / name)
        saver.save_now(
            {"progress": state.to_dict(), "config": run.model_dump(mode="json"), "provenance": {}, "data": {}}
        )
        losses += advance(engine, run, state, STEPS - SAVED)
        changes, weights = figures(engine)

        engine, resumed = build(run), TrainingState()
        checkpoint = Checkpointer(engine, Path(directory) / name).load_latest()
        resumed.load_dict(checkpoint.description["progress"])
        again = advance(engine, run, resumed, STEPS - SAVED)
        changes_again, weights_again = figures(engine)
        same = all(torch.equal(weights[key], weights_again[key]) for key in weights)
        found[name] = changes, losses, same and changes_again == changes and again == losses[SAVED:]
    return found


def test_layouts_decide_alike_and_a_resume_keeps_the_bits(tmp_path):
    (one,) = run_distributed(train, 1, str(tmp_path / "one"), {"one": {"zero_stage": 1}})
    expected, losses, resumed = one["one"]
    assert resumed
    ends = [step for step, _ in expected]
    assert len(expected) >= 2 and any(step <= SAVED for step in ends) and any(step > SAVED for step in ends)
    for result in run_distributed(train, 2, str(tmp_path / "two"), LAYOUTS, timeout_s=240):
        for name, (changes, found, same) in result.items():
            assert same, name
            assert changes == expected, name
            assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in losses], rel=1e-5), name
