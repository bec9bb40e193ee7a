"""One job per run directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hope_megatron.runtime.files import write_text
from hope_megatron.training.run_directory import RunDirectory, RunDirectoryError

HOLD = """
import sys, time
from pathlib import Path
from hope_megatron.training.run_directory import RunDirectory
RunDirectory(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_job_is_refused_and_told_who_holds_it(tmp_path, holder):
    with pytest.raises(RunDirectoryError, match=f"process {holder.pid} on "):
        RunDirectory(tmp_path / "run").acquire()


def test_lock_of_a_killed_job_clears_itself(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    directory = RunDirectory(tmp_path / "run")
    directory.acquire()
    directory.release()


def test_unwritable_place_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="choose another output_dir"):
        RunDirectory(tmp_path / "file" / "run").acquire()


def test_write_atomically_leaves_no_temporary_file(tmp_path):
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "new"
