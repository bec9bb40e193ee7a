"""`hope consolidate` as a user types it: a day, a night, a run that every other command takes; and the same from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hope_megatron.cli.main import main
from hope_megatron.testing.drill import Drill

OPTIONS = ["--replay", "8", "--draws", "4", "--steps", "4", "optim.warmup_steps=1"]


def hope(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hope_megatron", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on two ranks."""
    drill = Drill(tmp_path_factory.mktemp("nights"), tp=1, steps=4, every=4)
    drill.prepare()
    code, output = drill.run("days")
    assert code == 0, output
    (drill.root / "today.txt").write_text("def first():\n    return 'a day has brought this'\n" * 20)
    return drill.run_dir("days")


def test_a_night_on_two_ranks_is_a_run_like_any_other(run: Path) -> None:
    text = run.parents[1] / "today.txt"
    done = hope("consolidate", run, "--wake", text, "--nproc", 2, "--oversubscribe", "--json", *OPTIONS)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{\n") :])
    night = Path(report["run"])
    assert night.name == "days-night-1" and report["levels"] == {"1": 1} and report["steps"] == 4
    assert set(report["figures"]["read"]) == {"before", "adapted", "after"}
    scored = hope("eval", night, "--max-tokens", 200)
    assert scored.returncode == 0 and "nats per token" in scored.stdout, scored.stderr


def test_a_night_from_python(run: Path) -> None:
    code = f"""
import hope_megatron
found = hope_megatron.consolidate({str(run)!r}, wake=[{str(run.parents[1] / "today.txt")!r}], out="from-python", replay=8,
    draws=4, steps=4, overrides=["optim.warmup_steps=1"])
assert found["figures"]["read"]["after"] > 0 and found["run"].endswith("from-python"), found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no text to read: give --wake FILE"),
        (["--wake", "nowhere.txt"], "no file nowhere.txt"),
        (["--wake", "TEXT", "--levels", "9"], "--levels 9: give levels from 1 (fastest) to 2"),
        (["--wake", "TEXT", "--general-share", "1"], "--general-share 1.0 must be from 0 to below 1"),
        (["--wake", "TEXT", "--out", "days"], "is the run itself"),
    ],
)
def test_mistakes_are_one_line(run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(run.parents[1] / "today.txt")
    given = [text if argument == "TEXT" else argument for argument in arguments]
    assert main(["consolidate", str(run), *given, "--dry-run"]) == 2
    assert words in capsys.readouterr().err


def test_a_dry_run_touches_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(run.parents[1] / "today.txt")
    assert main(["consolidate", str(run), "--wake", text, "--out", "not-yet", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"].endswith("not-yet")
    assert not (run.parent / "not-yet").exists()
