"""What differs between two configurations, by dotted key and in words."""

from __future__ import annotations

import pytest

from hope_megatron.config.changes import (
    describe_changes,
    describe_entry,
    differences,
    leaves,
    settings_changes,
    settings_entry,
)
from hope_megatron.testing.tiny import tiny_run_config


@pytest.mark.parametrize(
    ("before", "after", "changes", "text"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 1}}, {}, ""),
        ({"lr": 1e-3}, {"lr": 0.05}, {"lr": [1e-3, 0.05]}, "lr 0.001 -> 0.05"),
        ({"b": [0.9, 0.95]}, {"b": [0.9, 0.99]}, {"b.1": [0.95, 0.99]}, "b.1 0.95 -> 0.99"),
        ({"b": [1]}, {"b": [1, 2]}, {"b.1": [None, 2]}, "b.1 none -> 2"),
        ({"x": {}}, {"x": {"y": True}}, {"x.y": [None, True], "x": [{}, None]}, "x.y none -> true, x {} -> none"),
        ({"k": None}, {"k": "bf16"}, {"k": [None, "bf16"]}, "k none -> bf16"),
        ({"n": 1}, {"n": 1.0}, {}, ""),
        ({"t": "x" * 200}, {"t": "y"}, {"t": ["x" * 200, "y"]}, f"t {'x' * 77}... -> y"),
    ],
)
def test_differences(before, after, changes, text):
    assert differences(before, after) == changes
    assert describe_changes(changes) == text


def test_every_key_of_a_run_is_compared():
    before = tiny_run_config().model_dump(mode="json")
    flat = leaves(before)
    assert {
        "optim.betas.1",
        "model.cms.levels.1.update_period_steps",
        "training.precision",
        "tracking.tags",
    } <= flat.keys()
    after = tiny_run_config(optim={"lr": 0.5}, training={"global_batch_size": 8}).model_dump(mode="json")
    assert differences(before, after) == {"optim.lr": [0.01, 0.5], "training.global_batch_size": [4, 8]}


def test_a_history_tells_settings_from_conversions():
    history = [
        {"operation": "reshard", "source": "runs/a"},
        settings_entry(6, {"optim.lr": [0.01, 0.5]}),
    ]
    assert settings_changes(history) == [(6, {"optim.lr": [0.01, 0.5]})]
    assert [describe_entry(entry) for entry in history] == [
        "made by reshard of runs/a",
        "from step 7 on: optim.lr 0.01 -> 0.5",
    ]
