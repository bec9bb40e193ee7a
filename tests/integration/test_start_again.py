"""A run that is started again with other settings says so everywhere, and epochs are counted. One process runs all commands."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer

RUN = """
name: again
output_dir: {root}/runs
model:
  vocab_size: 384
  num_layers: 1
  hidden_size: 32
  num_heads: 2
  memory: {{chunk_tokens: 8}}
  cms: {{levels: [{{hidden_size: 32}}]}}
optim: {{lr: 0010e-3, warmup_steps: 2, name: adamw}}
training: {{steps: 06, seq_length: 16, global_batch_size: 4, precision: fp32, log_every: 1, eval_sequences: 2}}
data: {{train: {root}/data/train, heldout: {root}/data/heldout, tokenizer: {root}/tokenizer.model}}
"""
SCRIPT = """
import json, sys
from hope_megatron.cli.main import main
for command in json.loads(sys.argv[1]):
    print("COMMAND", flush=True)
    print("exit code", main(command), flush=True)
    from hope_megatron.parallel.distributed import shutdown_distributed
    shutdown_distributed()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small corpus, and a run file."""
    root = tmp_path_factory.mktemp("again")
    text = Path(argparse.__file__).read_text()
    for number in range(20):
        (root / f"text-{number}.txt").write_text(text[number * 1000 : number * 1000 + 1000])
    train_tokenizer([text], root / "tokenizer.model", 384)
    prepare([str(root / "text-*.txt")], root / "tokenizer.model", root / "data", held_out_fraction=0.2, workers=1)
    (root / "run.yaml").write_text(RUN.format(root=root))
    return root


@pytest.fixture(scope="module")
def outputs(root):
    """What each command said."""
    run = str(root / "run.yaml")
    changed = ["training.steps=8", "optim.lr=0.5", "training.global_batch_size=8"]
    commands = [
        ["train", run, "--in-process"],
        ["train", run, *changed, "--dry-run"],
        ["train", run, *changed, "--in-process"],
        ["train", run, "training.steps=10", "--in-process"],
        ["checkpoint", "inspect", str(root / "runs/again")],
        ["export", "hf", str(root / "runs/again"), str(root / "export")],
        ["plan", run, "training.steps=1000"],
        ["plan", run, "data.train=/nowhere"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280,
    )  # fmt: skip
    parts = done.stdout.split("COMMAND\n")[1:]
    assert [part.rstrip().splitlines()[-1] for part in parts] == ["exit code 0"] * len(commands), done.stdout
    return parts


CHANGES = [
    {"operation": "settings", "step": 6, "changes": {
        "optim.lr": [0.01, 0.5], "training.steps": [6, 8], "training.global_batch_size": [4, 8]}},
    {"operation": "settings", "step": 8, "changes": {
        "optim.lr": [0.5, 0.01], "training.steps": [8, 10], "training.global_batch_size": [8, 4]}},
]  # fmt: skip


def test_numbers_are_those_of_yaml_1_2(root, outputs):
    before = json.loads((root / "runs/again/checkpoints/step-00000010/checkpoint.json").read_text())["config"]
    assert before["optim"]["lr"] == 0.01 and before["training"]["steps"] == 10


def test_changes_are_said_when_they_are_made_and_when_an_override_is_left_off(outputs):
    first, dry, second, third, *_ = outputs
    assert "settings differ" not in first
    expected = "optim.lr 0.01 -> 0.5, training.steps 6 -> 8, training.global_batch_size 4 -> 8"
    assert f"# changed since the newest start: {expected}" in dry
    for text, step, line in ((second, 6, "optim.lr 0.01 -> 0.5"), (third, 8, "optim.lr 0.5 -> 0.01")):
        assert f"settings differ from those of the steps up to {step}" in text
        assert f"\n  {line}\n" in text
    assert "give it again, for example optim.lr=0.5" in third


def test_a_schedule_that_rises_is_said(outputs):
    for text in outputs[1:3]:
        assert "the learning rate goes up again: 0.001 at step 6, 0.08 at step 7" in text
        assert "`optim.schedule=constant optim.lr=0.001`" in text


def test_the_history_is_in_the_run_the_checkpoint_and_the_card(root, outputs):
    run = root / "runs/again"
    assert json.loads((run / "history.json").read_text())["history"] == CHANGES
    checkpoint = json.loads((run / "checkpoints/step-00000010/checkpoint.json").read_text())
    assert checkpoint["history"] == CHANGES
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == 0.01
    assert "from step 7 on: optim.lr 0.01 -> 0.5" in outputs[4] and "from step 9 on: optim.lr 0.5 -> 0.01" in outputs[4]
    card = (root / "export/README.md").read_text()
    assert "| changed after step 6 | optim.lr 0.01 -> 0.5, " in card and "training.steps 6 -> 8" in card
    assert "| changed after step 8 | optim.lr 0.5 -> 0.01, " in card


def test_mlflow_shows_the_changes(root, outputs):
    from mlflow.tracking import MlflowClient

    tracking = json.loads((root / "runs/again/tracking.json").read_text())
    client = MlflowClient(tracking_uri=tracking["uri"])
    tags = client.get_run(tracking["run_id"]).data.tags
    assert tags["settings from step 7"].startswith("optim.lr 0.01 -> 0.5, ")
    assert tags["settings from step 9"].startswith("optim.lr 0.5 -> 0.01, ")
    assert {"config.yaml", "history.json"} <= {artifact.path for artifact in client.list_artifacts(tracking["run_id"])}


def test_epochs_are_counted_in_plan_dry_run_start_and_report(root, outputs):
    first, dry, _, third, _, _, plan, no_data = outputs
    tokens = int(re.search(r"data: [\d.]+ epochs of train \(([\d,]+) tokens\)", first)[1].replace(",", ""))
    seen = (6 * 4 + 2 * 8 + 2 * 4) * 16
    summary = json.loads((root / "runs/again/summary.json").read_text())
    assert summary["epochs"] == {"train": pytest.approx(seen / tokens)}
    assert re.search(r"done in .*, [\d.]+ epochs of train", third)
    assert "epochs of train" in dry and "Repeated data" not in first
    epochs = 1000 * 4 * 16 / tokens
    assert epochs > 4 and f"{epochs:,.3g} epochs of train" in plan
    assert "Repeated data" in plan and "arXiv 2305.16264" in plan
    assert "data: epochs unknown: cannot read the manifest /nowhere" in no_data
