"""Every mistake gets one message with the remedy and exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.corpus import expand_sources
from data_pipeline.errors import DataError

ROOT = Path(__file__).parents[2]


def quickstart(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hope_megatron", "quickstart", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--text", "empty.txt"], "holds no text"),
        (["--text", "binary.txt"], "none of the 1 documents is text (bad_utf8 1)"),
        (["--text", "no_*.txt"], "matches no file"),
        (["--text", "folder"], "holds no file"),
        (["--text", "small.txt"], "more than the corpus supports. The largest that works is"),
        (["training.stepz=3"], "did you mean training.steps"),
        (["optim.warmup_steps=900000"], "longer than training.steps"),
        (["--config", "quikstart"], "did you mean quickstart"),
    ],
)
def test_bad_input_is_told_and_leaves_no_model(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 100)
    (tmp_path / "small.txt").write_text("a few words, and no more\n" * 40)
    (tmp_path / "folder").mkdir()
    done = quickstart(tmp_path, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/**/*.safetensors")) and not list(tmp_path.glob("runs/**/report.json"))


@pytest.mark.parametrize("source", ["closed", "."])
def test_an_unreadable_directory_is_named(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open.txt").write_text("text")
    (tmp_path / "closed").mkdir(mode=0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # the superuser may read everything, nobody may not
    try:
        with pytest.raises(DataError, match=r"closed.* may not be read") as error:
            expand_sources([source])
    finally:
        os.seteuid(user)
    assert error.value.is_user_error


def test_two_at_once_in_one_place_are_refused(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "runs").mkdir()
    with open(tmp_path / "runs/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = time.monotonic()
        done = quickstart(tmp_path)
    assert done.returncode == 2 and "another process" in done.stderr
    assert time.monotonic() - started < 10
    assert not (tmp_path / "runs/quickstart").exists()
