"""`make gpu-check` on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_says_what_it_would_do(check, monkeypatch, capsys):
    monkeypatch.setattr(check, "gpus", list)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert check.main() == 0
    text = capsys.readouterr().out
    assert (
        "nothing was run" in text and "pytest -q tests/gpu" in text and "benchmarks/train.py --model hope_760m" in text
    )


def test_refuses_a_line_that_is_not_there(check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "teapot"])
    assert check.main() == 2
    assert "no such line; known: tests" in capsys.readouterr().err


def test_a_benchmark_and_its_rehearsal_are_of_the_same_run(check):
    assert check._overrides(check.MODELS["hope_760m"]) == [
        "training.seq_length=4096",
        "training.micro_batch_size=8",
        "training.global_batch_size=8",
        "training.recompute=layer",
        "model.num_layers=6",
    ]


def test_a_rehearsed_peak_that_is_wrong_is_said(check, tmp_path):
    real = {
        "peak_memory_bytes": 100,
        "step_seconds": {"median": 1.0},
        "tokens_per_second": 1.0,
        "model_flops_utilization": 0.4,
    }
    (tmp_path / "m.json").write_text(json.dumps({"models": {"m": real}}))
    (tmp_path / "m.rehearsed.json").write_text('{"peak_memory_bytes": 80, "step_s": 1.1}')
    assert check.compared("m", tmp_path)["verdict"] == "the rehearsed peak is wrong"
    assert check.compared("other", tmp_path) is None
