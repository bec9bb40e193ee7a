"""Settings that change when a run is resumed, and schedules that rise again."""

from __future__ import annotations

import json
import logging
import re

import pytest

from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.training.history import (
    announce_changes,
    history_tags,
    learning_rate_rise,
    outlook,
    resumed_history,
    write_history,
)
from hope_megatron.training.metrics import MetricsFile
from hope_megatron.training.run_directory import RunDirectory


def description(config, step=6, world_size=1, **more):
    layout, progress = {"world_size": world_size}, {"step": step}
    return {"config": config.model_dump(mode="json"), "layout": layout, "progress": progress, **more}


@pytest.mark.parametrize(
    ("changed", "world_size", "changes"),
    [
        ({}, 1, {}),
        ({"optim": {"lr": 0.5}}, 1, {"optim.lr": [0.01, 0.5]}),
        ({"training": {"global_batch_size": 8}}, 1, {"training.global_batch_size": [4, 8]}),
        ({"precision": "bf16"}, 1, {"training.precision": ["fp32", "bf16"]}),
        ({"zero_stage": 2}, 2, {"parallel.zero_stage": [1, 2], "processes": [1, 2]}),
        ({"optim": {"name": "adamw"}}, 1, {"optim.name": ["m3", "adamw"]}),
    ],
)
def test_changes_join_the_history_of_the_checkpoint(changed, world_size, changes):
    before = [{"operation": "settings", "step": 2, "changes": {"optim.lr": [1, 0.01]}}]
    history, found = resumed_history(
        description(tiny_run_config(), history=before), tiny_run_config(**changed), world_size
    )
    assert found == changes
    assert history == before + ([{"operation": "settings", "step": 6, "changes": changes}] if changes else [])


def test_a_checkpoint_from_before_a_field_existed_has_its_default():
    old = description(tiny_run_config())
    del old["config"]["optim"]["grad_clip"], old["config"]["training"]["memory_every"]
    assert resumed_history(old, tiny_run_config(), 1) == ([], {})


def test_changes_are_said_one_a_line_with_the_way_back(caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        announce_changes({}, 6, tmp_path / "history.json")
        assert not caplog.records
        announce_changes({"optim.lr": [0.001, 0.05], "training.steps": [6, 12]}, 6, tmp_path / "history.json")
    assert "\n  optim.lr 0.001 -> 0.05\n  training.steps 6 -> 12\n" in caplog.text
    assert "optim.lr=0.001" in caplog.text and "left off counts" in caplog.text and "history.json" in caplog.text


def test_mlflow_gets_a_tag_for_each_change():
    history = [
        {"operation": "reshard", "source": "x"},
        {"operation": "settings", "step": 6, "changes": {"optim.lr": [0.001, 0.05]}},
    ]
    assert history_tags(history) == {"settings from step 7": "optim.lr 0.001 -> 0.05"}


STEADY = {"warmup_steps": 2, "lr": 1e-2, "min_lr_ratio": 0.1}
RISES = [
    # (optim before, steps before, optim after, steps after, step) -> rates that the warning quotes; None: no warning
    (({}, 6, {}, 12, 6), ("0.001", "0.0055")),  # cosine stretched: half of the new decay is to come
    (({"schedule": "linear"}, 6, {"schedule": "linear"}, 12, 6), ("0.001", "0.0055")),
    (({"schedule": "wsd", "decay_steps": 4}, 6, {"schedule": "wsd", "decay_steps": 4}, 12, 6), ("0.001", "0.01")),
    (({}, 12, {}, 24, 6), ("0.0069", "0.0089")),  # in the middle of the decay
    (({}, 12, {"min_lr_ratio": 0.9}, 12, 6), ("0.0069", "0.0095")),
    (({}, 12, {}, 12, 6), None),
    (({}, 6, {"schedule": "constant", "lr": 0.001}, 12, 6), None),  # the advice
    (({}, 6, {"lr": 0.001}, 12, 6), None),
    (({}, 12, {"lr": 0.5}, 12, 6), None),  # a higher peak is a change of its own, and is said as that
    (({"schedule": "constant"}, 6, {"schedule": "constant"}, 12, 6), None),
    (
        ({"schedule": "wsd", "decay_steps": 4}, 12, {"schedule": "wsd", "decay_steps": 4}, 24, 6),
        None,
    ),  # before its decay
    (({"warmup_steps": 8}, 20, {"warmup_steps": 8}, 40, 6), None),  # still warming up
    (({}, 6, {}, 6, 6), None),  # nothing to come
]


@pytest.mark.parametrize(("case", "rates"), RISES)
def test_a_schedule_that_rises_again_is_said(case, rates):
    optim_before, steps_before, optim_after, steps_after, step = case
    before = tiny_run_config(optim=STEADY | optim_before, training={"steps": steps_before}).model_dump(mode="json")
    config = tiny_run_config(optim=STEADY | optim_after, training={"steps": steps_after})
    text = learning_rate_rise(before, config, step)
    if rates is None:
        assert text is None
        return
    assert f"{rates[0]} at step {step}, {rates[1]} at step {step + 1}" in text
    advice = dict(re.findall(r"optim\.(schedule|lr)=([\w.-]+)", text.partition("For runs")[0]))
    followed = STEADY | optim_after | {"schedule": advice["schedule"], "lr": float(advice["lr"])}
    assert learning_rate_rise(before, tiny_run_config(optim=followed, training={"steps": steps_after}), step) is None


def test_a_dry_run_looks_ahead(tmp_path):
    config = tiny_run_config(output_dir=tmp_path, optim=STEADY)
    directory = RunDirectory(config.run_dir)
    assert outlook(config, directory) == []
    directory.path.mkdir()
    write_history(directory.history, config, [])
    MetricsFile(directory.metrics).append(6, {"train/loss": 1.0})
    assert outlook(config, directory) == []
    longer = tiny_run_config(output_dir=tmp_path, optim=STEADY, training={"steps": 12})
    changed, warning = outlook(longer, directory)
    assert changed == "changed since the newest start: training.steps 6 -> 12"
    assert warning.startswith("warning: the learning rate goes up again: 0.001 at step 6, 0.0055 at step 7")
    directory.history.write_text("{")
    assert outlook(longer, directory) == []
    assert json.loads(json.dumps(config.model_dump(mode="json")))["name"] == "tiny"
