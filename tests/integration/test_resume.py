"""`hope train` as a user runs it: killed, damaged, stopped, misused; two gloo processes, TP 2 with sequence parallelism."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from data_pipeline import train_tokenizer
from data_pipeline.prepare import prepare
from hope_megatron.training.metrics import read_metrics
from hope_megatron.training.phases import START_UP

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUN = """
name: {name}
output_dir: {root}/runs
model:
  vocab_size: {vocab}
  num_layers: 1
  hidden_size: 32
  num_heads: 2
  memory: {{chunk_tokens: 8}}
  cms: {{levels: [{{hidden_size: 32}}, {{hidden_size: 32, update_period_steps: 3}}]}}
parallel: {{tensor_parallel: 2, sequence_parallel: true, zero_stage: 1}}
optim: {{name: m3, lr: 5e-3, slow_period_steps: 5, warmup_steps: 2}}
training: {{steps: 13, seq_length: 16, global_batch_size: 2, precision: fp32, log_every: 1, eval_every: 6, ema: 0.7,
  eval_sequences: 4}}
data: {{train: {root}/data/train, heldout: {root}/data/heldout, tokenizer: {root}/tokenizer.model}}
checkpoint: {{every: 3, keep_last: 4}}
tracking: {{mlflow: false}}
"""
VOCAB = 384
# Not state of the run, and different by nature: clocks.
UNREPEATABLE = ("speed/", "time/", "checkpoint/stall_s")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with a small corpus, tokenizer and shards."""
    root = tmp_path_factory.mktemp("resume")
    texts = [Path(module.__file__).read_text() for module in (argparse, json, contextlib)]
    for number in range(12):
        (root / f"text-{number}.txt").write_text(texts[number % 3][number * 700 : number * 700 + 4000])
    train_tokenizer([path.read_text() for path in sorted(root.glob("*.txt"))], root / "tokenizer.model", VOCAB)
    prepare([str(root / "text-*.txt")], root / "tokenizer.model", root / "data", held_out_fraction=0.2, workers=1)
    return root


def start(root, name, *arguments, command=("train",)):
    """`hope train`, in a process group of its own, so that a test can kill all of it."""
    config = root / f"{name}.yaml"
    config.write_text(RUN.format(name=name, root=root, vocab=VOCAB))
    program = [sys.executable, "-m", "hope_megatron", *command, str(config), "--oversubscribe", *arguments]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finish(process):
    """Exit code and everything it said."""
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def records(root, name):
    return read_metrics(root / "runs" / name / "metrics.jsonl")


def wait_until(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "the run did not come so far"
        time.sleep(0.01)


def wait_for_step(root, name, step, process):
    wait_until(lambda: any(record["step"] >= step for record in records(root, name)), process)


def is_repeatable(name):
    return not name.startswith(UNREPEATABLE)


def repeatable(root, name):
    return [{k: v for k, v in record.items() if is_repeatable(k)} for record in records(root, name)]


def descendants_of(pid):
    """Process ids of children, their children, and so on: ranks are forked by a child of the supervisor."""
    children = [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [below for child in children for below in (*descendants_of(child), child)]


def kill_everything(process):
    """SIGKILL for the launcher and its workers, as when a node dies."""
    for pid in [process.pid, *descendants_of(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def undisturbed(root):
    """Started as `hope launch --local`, which is the same run as `hope train`: the others must end with its bits."""
    process = start(root, "undisturbed", "--nproc", "2", command=("launch", "--local"))
    code, output = finish(process)
    assert code == 0, output
    return root / "runs" / "undisturbed"


def test_killed_and_damaged_run_ends_in_the_same_bits(root, undisturbed):
    process = start(root, "killed")
    checkpoints = root / "runs" / "killed" / "checkpoints"
    wait_until((checkpoints / "step-00000006").is_dir, process)  # M3 is in its slow period 6-10 then
    kill_everything(process)
    newer = [path for path in checkpoints.glob("step-*") if path.name > "step-00000003"]
    for path in newer:
        flip_a_bit(path / "rank-00001.safetensors")

    code, output = finish(start(root, "killed"))
    assert code == 0, output
    assert output.count("rank-00001.safetensors is corrupt") == len(newer) >= 1
    assert "resumed from" in output and "step-00000003" in output  # itself inside the slow period 1-5

    for found, expected in zip(repeatable(root, "killed"), repeatable(root, "undisturbed"), strict=True):
        assert found == expected
        assert {"train/loss", "train/grad_norm", "optim/update_rms/matrix"} <= found.keys()
    assert {"heldout/loss", "heldout/loss_ema"} <= repeatable(root, "killed")[-1].keys()
    final = "checkpoints/step-00000013"
    names = [f"rank-{rank:05d}.safetensors" for rank in range(2)] + ["probe.safetensors"]
    for name in names:
        expected, found = (load_file(path / final / name) for path in (undisturbed, root / "runs" / "killed"))
        assert found.keys() == expected.keys() and len(expected) > 1
        for key in expected:
            assert found[key].numpy().tobytes() == expected[key].numpy().tobytes(), (name, key)
    progress = [
        json.loads((path / final / "checkpoint.json").read_text())["progress"]
        for path in (undisturbed, root / "runs" / "killed")
    ]
    for entry in progress:
        del entry["wall_s"]
    assert progress[0] == progress[1]


def test_run_leaves_everything_that_was_promised(undisturbed):
    present = {path.name for path in undisturbed.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "train.log", "checkpoints", "curves.png", "summary.json"} <= present
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["complete"] and summary["step"] == 13 and summary["world_size"] == summary["tensor_parallel"] == 2
    assert summary["sequence_parallel"] and summary["zero_stage"] == 1 and summary["optimizer"] == "m3"
    assert summary["tokens"] == 13 * 2 * 16 and summary["newton_schulz_calls"] > 13
    assert summary["phases_s"].keys() == {*START_UP, "steps"}
    started = json.loads((undisturbed / "start_up.json").read_text())
    assert started == {"step": 1, "phases_s": {phase: summary["phases_s"][phase] for phase in START_UP}}
    assert all(0 <= seconds < 200 for seconds in started["phases_s"].values())
    assert re.search(r"started in \d+\.\d s: launch \d", (undisturbed / "train.log").read_text())
    first, *later = read(undisturbed / "metrics.jsonl")
    assert first["time/start_imports_s"] == started["phases_s"]["imports"]
    assert not any("time/start_imports_s" in record for record in later)
    heldout = [record for record in read(undisturbed / "metrics.jsonl") if "heldout/loss" in record]
    assert [record["step"] for record in heldout] == [6, 12, 13]
    assert summary["heldout_loss"] == heldout[-1]["heldout/loss"]
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir())[-1] == "step-00000013"
    assert len(list((undisturbed / "checkpoints").iterdir())) == 4


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ctrl_c_saves_and_a_second_job_is_refused_meanwhile(root):
    process = start(root, "stopped", "training.steps=100000")
    wait_for_step(root, "stopped", 2, process)
    began = time.monotonic()
    code, output = finish(start(root, "stopped"))
    assert code == 2 and "is in use by process" in output and time.monotonic() - began < 15
    os.kill(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "Ctrl-C: saving at step" in output and "the same command resumes it" in output and "Traceback" not in output
    step = records(root, "stopped")[-1]["step"]
    assert (root / "runs/stopped/checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()

    code, output = finish(start(root, "stopped", "model.hidden_size=64"))
    assert code == 2, output
    assert output.count("error:") == 1 and "Traceback" not in output
    assert "model.hidden_size: 32 in the checkpoint, 64 in this run" in output
