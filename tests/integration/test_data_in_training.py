"""`hope train` on mixtures, with a corrupt shard, and over a change of the data. One process runs all commands."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.ledger import Ledger
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from hope_megatron.training.metrics import read_metrics

pytestmark = pytest.mark.distributed

VOCAB = 384
MODULES = {"first": argparse, "more": contextlib, "second": json.decoder}
RUN = """
name: mixed
output_dir: {root}/runs
model:
  vocab_size: {vocab}
  num_layers: 1
  hidden_size: 32
  num_heads: 2
  memory: {{chunk_tokens: 8}}
  cms: {{levels: [{{hidden_size: 32}}]}}
optim: {{warmup_steps: 2}}
training: {{steps: 4, seq_length: 16, global_batch_size: 8, precision: fp32, log_every: 1, eval_sequences: 2}}
data:
  train: {root}/first/train
  mix_with: {{more: {root}/more/train}}
  mix_schedule:
    - {{weights: {{train: 1, more: 1}}}}
    - {{from_tokens: 256, weights: {{train: 1}}}}
  tokenizer: {root}/tokenizer.model
  on_corrupt: skip
tracking: {{mlflow: false}}
"""
SCRIPT = """
import json, sys
from hope_megatron.cli.main import main
from hope_megatron.parallel.distributed import shutdown_distributed
for command in json.loads(sys.argv[1]):
    print("exit code", main(command), flush=True)
    shutdown_distributed()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three data sets; a bit of the second is flipped."""
    root = tmp_path_factory.mktemp("mixed")
    texts = {name: Path(module.__file__).read_text()[:20_000] for name, module in MODULES.items()}
    train_tokenizer(texts.values(), root / "tokenizer.model", VOCAB)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)
        prepare([str(root / f"{name}.txt")], root / "tokenizer.model", root / name, held_out_fraction=0.0, workers=1)
    shard = root / "more/train" / Manifest.load(root / "more/train").shards[0].name
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(bytes(data))
    return root


def test_mixture_corrupt_shard_and_transition_of_the_data(root):
    run = root / "run.yaml"
    run.write_text(RUN.format(root=root, vocab=VOCAB))
    other = f"data.train={root}/second/train"
    commands = [
        ["train", str(run)],
        ["train", str(run), "training.steps=6", other],
        ["train", str(run), "training.steps=6", other, "--data-transition", "the second edition"],
        ["train", str(run), "training.steps=8", other],
        ["train", str(run), "name=strict", "data.on_corrupt=stop"],
        *(["data", "inspect", str(root / "runs/mixed"), "--step", str(step), "--json"] for step in (1, 4, 5, 8)),
        ["data", "inspect", str(run), "--step", "3"],
        ["data", "decode", str(root / "runs/mixed"), "--sample", "33", "--json"],
        ["data", "inspect", str(root / "runs/mixed"), "--step", "0"],
    ]
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)], capture_output=True, text=True, timeout=240
    )
    said = finished.stdout + finished.stderr
    codes = [line.split()[-1] for line in finished.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["0", "2", "0", "0", "2", "0", "0", "0", "0", "0", "0", "2"], said
    assert "--data-transition" in said and "datasets.train.manifest" in said

    shard = Manifest.load(root / "more/train").shards[0]
    assert f"{shard.name} has changed: its SHA-256 is" in said and shard.sha256 in said

    records = read_metrics(root / "runs/mixed/metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert all(record["train/samples"] == 8 * record["step"] for record in records)
    assert all(record["time/data_stall_s"] >= 0 for record in records)
    # Half of the samples of the first 256 tokens, two steps, come from the corrupt shard and carry no loss. Other data begin
    # at their beginning, and their schedule with them.
    tokens = [0, *(record["train/tokens"] for record in records)]
    steps = [after - before for before, after in itertools.pairwise(tokens)]
    assert [count == 128 for count in steps] == [False, False, True, True] * 2 and min(steps) > 0

    corrupt, transition = Ledger(root / "runs/mixed/data_ledger.jsonl").entries()
    assert (corrupt["kind"], corrupt["shard"], corrupt["sha256"]) == ("corrupt", shard.name, shard.sha256)
    assert (transition["kind"], transition["sample"], transition["step"]) == ("transition", 32, 4)
    assert transition["reason"] == "the second edition"

    # The documents of a step, of the data before the transition as of those after it.
    found = dict(
        zip((1, 4, 5, 8), map(json.loads, re.findall(r"^\[\n.*?^\]$", finished.stdout, re.M | re.S)), strict=True)
    )
    for step, documents in found.items():
        assert {number for entry in documents for number in entry["samples"]} == set(range(8 * step - 8, 8 * step))
    for step, name in ((1, "first.txt"), (5, "second.txt")):
        (left_out,) = [entry for entry in found[step] if entry["dataset"] == "more"]
        assert left_out["source"].startswith("left out") and left_out["document"] == -1
        assert {Path(entry["source"]).name for entry in found[step] if entry["dataset"] == "train"} == {name}
    assert {entry["dataset"] for entry in found[4]} == {"train"} == {entry["dataset"] for entry in found[8]}
    assert "step 3: samples 16 to 23, " in finished.stdout  # by the run file: before it is run, as far as it knows
    assert "step 0 does not exist" in said
