"""A sweep of real, tiny runs through the real command: planned, interrupted, finished, reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data_pipeline.corpus import iterate_texts
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from hope_megatron.cli.main import main
from hope_megatron.training.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a sweep of two families with one size and two lengths each."""
    home = tmp_path_factory.mktemp("sweep")
    for i in range(60):
        (home / f"text{i}.py").write_text(
            "".join(f"def function_{i}_{j}(x):\n    return x + {j * i}\n" for j in range(40))
        )
    sources = sorted(map(str, home.glob("*.py")))
    tokenizer = train_tokenizer(iterate_texts(sources), home / "tokenizer.model", 320)
    prepare(sources, tokenizer, home / "data", held_out_fraction=0.2)
    model = {"model.vocab_size": 320}
    sweep = {
        "name": "tiny",
        "output_dir": str(home / "sweeps"),
        "base": {
            "training": {
                "seq_length": 32, "global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32",
                "eval_sequences": 4, "log_every": 1,
            },
            "optim": {"name": "adamw", "lr": 1e-2},
            "parallel": {"zero_stage": 0},
            "checkpoint": {"every": 5},
            "tracking": {"mlflow": False},
            "data": {
                "train": str(home / "data/train"), "heldout": str(home / "data/heldout"),
                "tokenizer": str(home / "tokenizer.model"),
            },
        },
        "families": {
            "hope": {"model": "hope_tiny", "model.memory.chunk_tokens": 16, **model},
            "transformer_pp": {"model": "transformer_pp_tiny", **model},
        },
        "sizes": {"widths": [32], "depths": [1], "head_size": 16},
        "design": {"tokens": [1536, 16000]},
        "warmup_fraction": 0.1,
        "hardware": {"name": "cpu"},
    }  # fmt: skip
    path = home / "tiny.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def run(sweep_file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hope_megatron", "sweep", "run", str(sweep_file), "--workers", "2"]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps(metrics: Path) -> list[int]:
    return [record["step"] for record in read_metrics(metrics)]  # a line may be half written


def finished(runs: Path) -> dict[str, int]:
    """Runs that are complete, and when their summary was written."""
    summaries = [path for path in runs.glob("*/summary.json") if json.loads(path.read_text())["complete"]]
    return {path.parent.name: path.stat().st_mtime_ns for path in summaries}


def test_interrupted_sweep_goes_on_and_is_reported(sweep_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = sweep_file.parent / "sweeps/tiny/runs"
    first = run(sweep_file)
    deadline = time.monotonic() + 200
    long_run = runs / "hope-w32d1-t16K/metrics.jsonl"
    while len(steps(long_run)) < 8 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    printed, _ = first.communicate(timeout=100)
    assert first.returncode == 130, printed
    assert "stopped; the same command goes on" in printed
    assert 8 <= steps(long_run)[-1] < 125
    before = finished(runs)
    assert 2 <= len(before) < 4

    second = run(sweep_file)
    printed, _ = second.communicate(timeout=280)
    assert second.returncode == 0, printed
    assert f"{4 - len(before)} cells to run, {len(before)} finished" in printed
    assert before.items() <= finished(runs).items()  # untouched
    assert steps(long_run) == list(range(1, 126))  # resumed: every step once

    assert main(["sweep", "status", str(sweep_file)]) == 0
    assert "4 finished" in capsys.readouterr().out
    assert main(["sweep", "report", str(sweep_file)]) == 0
    page = (sweep_file.parent / "sweeps/tiny/report.html").read_text()
    assert "nothing to recommend" in page and "at least 6 finished runs" in page and "data:image/png;base64," in page
