"""The whole road on a toy scale, through the real command; then eval, generate and convert on what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hope_megatron.cli.main import main

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TOY = [
    "model.vocab_size=320",
    "model.hidden_size=32",
    "model.memory.chunk_tokens=16",
    "training.steps=6",
    "training.seq_length=32",
    "training.global_batch_size=4",
    "training.micro_batch_size=4",
    "training.eval_sequences=4",
    "optim.warmup_steps=2",
]

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("OMP_")},  # the command sets its own
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "PYTHONUNBUFFERED": "1",
}


def quickstart(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, in processes of its own."""
    command = [sys.executable, "-m", "hope_megatron", "quickstart", *TOY, *arguments]
    return subprocess.run(command, cwd=home, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)


class Here:
    """Runs other commands in this process, which saves their imports."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self._capsys = home, capsys

    def __call__(self, *arguments: str) -> str:
        """Standard output of a command that must succeed."""
        self._capsys.readouterr()
        assert main(arguments) == 0, self._capsys.readouterr().err
        return self._capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished quickstart over one text file, and what it printed."""
    home = tmp_path_factory.mktemp("home")
    lines = [f"def function_{i}(argument, value={i % 17}):\n    return argument + value * {i}\n" for i in range(1500)]
    (home / "text.py").write_text("\n".join(lines))
    done = quickstart(home, "--text", "text.py")
    assert done.returncode == 0, done.stdout + done.stderr
    return home, done.stdout


@pytest.fixture
def hope(finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Commands, run where the quickstart was."""
    monkeypatch.chdir(finished[0])
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # torch is in this process already, and too late to choose
    return Here(finished[0], capsys)


def test_report_holds_what_is_quoted(finished: tuple[Path, str]) -> None:
    home, printed = finished
    quickstart = home / "runs/quickstart"
    report = json.loads((quickstart / "report.json").read_text())
    assert (report["world_size"], report["tp"], report["zero_stage"]) == (2, 2, 1)
    assert report["sequence_parallel"] is True and report["optimizer"] == "m3"
    assert report["tokens_seen"] == 6 * 4 * 32
    assert report["parameters"] > 0 and report["tokens_per_second"] > 0 and report["newton_schulz_calls"] > 0
    assert 0 < report["bigram_loss"] < report["unigram_loss"]
    assert 0 < report["heldout_loss"] < 7
    assert report["export_logit_difference"] <= 1e-4
    phases = ["corpus", "tokenizer", "shards", "pretraining", "evaluation", "export", "total"]
    assert list(report["seconds"]) == phases
    assert report["seconds"]["total"] >= max(report["seconds"][name] for name in phases[:-1])
    markdown = (quickstart / "report.md").read_text()
    assert "| unigram" in markdown and "losses.png" in markdown
    for chart in ("losses.png", "curves.png"):
        assert (quickstart / chart).read_bytes().startswith(b"\x89PNG")
    for number in range(1, 8):
        assert f"[{number}/7]" in printed
    assert "mlflow ui" in printed


def test_evaluation_of_run_and_export_agree(hope: Here) -> None:
    report = json.loads((hope.home / "runs/quickstart/report.json").read_text())
    for model, data in (("hope", []), ("model", ["--data", "runs/quickstart/data/heldout"])):
        hope("eval", f"runs/quickstart/{model}", *data, "--json", "eval.json")
        result = json.loads((hope.home / "eval.json").read_text())
        assert result["scores"]["model"]["loss"] == pytest.approx(report["heldout_loss"], abs=1e-5)
        assert result["tokens"] == report["evaluation"]["tokens"]


def test_a_text_generated_in_two_sittings_is_the_text_of_one(hope: Here) -> None:
    command = ["generate", "runs/quickstart/model", "--temperature", "0", "--ignore-end", "--max-new-tokens"]
    whole = hope(*command, "16", "--prompt", "def f")
    first = hope(*command, "8", "--prompt", "def f", "--state", "s.st")
    second = hope(*command, "8", "--prompt", "", "--state", "s.st")
    assert first.removesuffix("\n") + second == whole


def test_generation_in_batches_and_from_files(hope: Here) -> None:
    (hope.home / "prompt.txt").write_text("def function")
    command = ["generate", "runs/quickstart/hope@6", "--max-new-tokens", "5", "--seed", "3"]
    batch = hope(*command, "--file", "prompt.txt", "-n", "3")
    assert batch.count("def function") == 3 and "--- 3 of 3" in batch
    assert hope(*command, "--file", "prompt.txt", "-n", "3") == batch


def test_convert_exports_and_inspects(hope: Here) -> None:
    assert "the training processes" in hope("export", "hf", "runs/quickstart/hope@6", "exported")
    original = hope.home / "runs/quickstart/model/model.safetensors"
    assert (hope.home / "exported/model.safetensors").read_bytes() == original.read_bytes()
    inspected = hope("checkpoint", "inspect", "runs/quickstart/hope")
    assert "all digests right" in inspected and "embedding.weight" in inspected


def test_an_export_is_where_another_run_starts(hope: Here) -> None:
    """Weights come back from the exported files into a run of another layout, and train on."""
    run_file = (hope.home / "runs/quickstart/run.yaml").read_text()
    run_file = run_file.replace("name: hope\n", "name: again\n", 1).replace(
        "sequence_parallel: true", "sequence_parallel: false"
    )
    (hope.home / "again.yaml").write_text(run_file.replace("tensor_parallel: 2", "tensor_parallel: 1"))
    hope("import", "hf", "runs/quickstart/model", "again.yaml")
    assert "held-out tokens" in hope("export", "hf", "runs/quickstart/again", "exported-again")
    original = (hope.home / "runs/quickstart/model/model.safetensors").read_bytes()
    assert (hope.home / "exported-again/model.safetensors").read_bytes() == original
    command = [sys.executable, "-m", "hope_megatron", "train", "again.yaml", "training.steps=2", "--nproc", "1"]
    done = subprocess.run(command, cwd=hope.home, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, again = (
        json.loads((hope.home / f"runs/quickstart/{run}/metrics.jsonl").read_text().splitlines()[0])
        for run in ("hope", "again")
    )
    assert again["step"] == first["step"] == 1  # the same samples, by weights that have seen them
    assert again["train/loss"] < first["train/loss"] - 0.05


def test_a_second_run_moves_the_first_aside(finished: tuple[Path, str]) -> None:
    home, _ = finished
    first = home / "runs/quickstart/report.json"
    before = first.read_text()
    done = quickstart(home, "--text", "nowhere")
    assert done.returncode == 2 and first.read_text() == before  # nothing moves for a mistake in the source
    done = quickstart(home, "model.vocab_size=100000", "--text", "text.py")
    assert done.returncode == 2 and "more than the corpus supports" in done.stderr
    assert not first.exists()
    (home / "runs/quickstart-1").rename(home / "runs/quickstart")
    assert first.read_text() == before


@pytest.mark.parametrize("phase", ["[2/7]", "steps 1 to"])
def test_ctrl_c_ends_with_one_line(finished: tuple[Path, str], tmp_path: Path, phase: str) -> None:
    home, _ = finished
    command = [sys.executable, "-m", "hope_megatron", "quickstart", *TOY, "training.steps=100000"]
    process = subprocess.Popen(
        [*command, "--text", str(home / "text.py")],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # as in a terminal: the signal goes to the whole foreground group
    )
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if phase in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    printed += process.stdout.readlines()
    assert process.wait(timeout=60) == 130, "".join(printed)
    assert "Traceback" not in "".join(printed)
    assert printed[-1] == "interrupted\n"
