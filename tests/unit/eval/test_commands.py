"""`hope eval` and `hope generate` as they are called: every option, every kind of output."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from hope_megatron.cli import eval as eval_command
from hope_megatron.cli import generate
from hope_megatron.cli.main import main
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.training.metrics import MetricsFile
from hope_megatron.training.mlflow_client import default_uri
from hope_megatron.training.run_directory import RunDirectory
from hope_megatron.training.tracking import Tracker, read_tracking


@pytest.fixture
def in_place(opened, monkeypatch: pytest.MonkeyPatch):
    """The commands open this model whatever the name."""
    for command in (eval_command, generate):
        monkeypatch.setattr(command, "open_model", lambda *_: opened)
    return opened


def evaluate(tmp_path: Path, *arguments: str) -> dict:
    assert main(["eval", "tiny", *arguments, "--json", str(tmp_path / "result.json")]) == 0
    return json.loads((tmp_path / "result.json").read_text())


def test_extrapolation_is_told_by_position(in_place, tmp_path: Path, text_file: Path, capsys) -> None:
    text_file.write_text(text_file.read_text() * 5)  # one row of 32 times the 16 tokens of training
    files = ["--markdown", str(tmp_path / "table.md"), "--png", str(tmp_path / "position.png")]
    result = evaluate(tmp_path, "--text", str(text_file), "--context", "32x", *files)
    ranges = [(row["from"], row["to"]) for row in result["loss_by_position"]]
    assert ranges[0] == (0, 16) and ranges[-1][1] == 512 and result["context_tokens"] == 512
    score = result["scores"]["model"]
    assert score["perplexity"] > score["byte_perplexity"] > 1 and score["word_perplexity"] > 1
    assert "position in the context" in (tmp_path / "table.md").read_text() and "position" in capsys.readouterr().out
    assert (tmp_path / "position.png").read_bytes().startswith(b"\x89PNG")


def test_more_context_is_slid_or_streamed(in_place, tmp_path: Path, text_file: Path) -> None:
    text = ["--text", str(text_file)]
    results = [evaluate(tmp_path, *text, *more) for more in ([], ["--stride", "4"], ["--context", "stream"])]
    assert [(r["stride_tokens"], r["context_tokens"]) for r in results] == [(None, 16), (4, 16), (None, None)]
    assert len({r["tokens"] for r in results}) == 1 and len({r["scores"]["model"]["loss"] for r in results}) == 3


def test_figures_go_to_the_mlflow_run_of_the_training(opened, tmp_path: Path, text_file: Path, monkeypatch) -> None:
    config = tiny_run_config(output_dir=tmp_path)
    config.run_dir.mkdir()
    directory = RunDirectory(config.run_dir)
    MetricsFile(directory.metrics).append(1, {"train/loss": 5.0})
    assert Tracker(config, directory, tags={}).close("FINISHED", timeout_s=120)
    checkpoint = config.run_dir / "checkpoints/step-00000007"
    monkeypatch.setattr(eval_command, "open_model", lambda *_: replace(opened, checkpoint=checkpoint, run=config))
    result = evaluate(tmp_path, "--text", str(text_file), "--mlflow")
    client = MlflowClient(tracking_uri=default_uri(tmp_path))
    (logged,) = client.get_metric_history(read_tracking(directory)["run_id"], "eval/loss")
    assert (logged.step, logged.value) == (7, pytest.approx(result["scores"]["model"]["loss"]))


def test_every_option_of_sampling(in_place, capsys) -> None:
    command = ["generate", "tiny", "--prompt", "def f", "--max-new-tokens", "6", "--ignore-end"]
    options = ["--temperature", "1.5", "--top-k", "20", "--top-p", "0.9", "--repetition-penalty", "1.3"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*command, *options, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert main([*command, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert main([*command, *options[2:4], "--top-k", "1", "--temperature", "1.5"]) == 0
    assert capsys.readouterr().out == greedy  # one candidate leaves no choice


def test_a_conversation_goes_on_line_by_line(in_place, tmp_path: Path, monkeypatch, capsys) -> None:
    lines = iter(["def f(", "return"])

    def say(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", say)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    greedy = ["--temperature", "0", "--ignore-end", "--max-new-tokens", "5"]
    assert main(["generate", "tiny", *greedy, "--state", str(tmp_path / "s.st")]) == 0
    spoken = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    for part, text in (("a", "def f("), ("b", "return")):
        assert main(["generate", "tiny", *greedy, "--prompt", text, "--state", str(tmp_path / "t.st")]) == 0, part
    answers = "".join(capsys.readouterr().out.replace("def f(", "", 1).replace("return", "", 1))
    assert spoken == answers and (tmp_path / "s.st").is_file()
