"""The environment of training processes, and how workers report back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from hope_megatron.runtime.process import (
    LAUNCH_TIME_VARIABLE,
    count_gpus,
    launch_time,
    process_environment,
    process_start_time,
    start_up_text,
)
from hope_megatron.runtime.reports import (
    LAUNCH_DIR_VARIABLE,
    read_failures,
    read_worker_pids,
    record_stop_signal,
    report_failure,
    report_ready,
)


class UserError(Exception):
    is_user_error = True


def test_openmp_does_not_spin():
    environment = process_environment(3)
    assert environment["OMP_WAIT_POLICY"] == "passive" and environment["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,2,5", 3)])
def test_visible_gpus(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count
    assert ("DS_ACCELERATOR" in process_environment()) is (count == 0)


def test_reports_reach_the_launcher_in_order(monkeypatch, tmp_path):
    monkeypatch.setenv(LAUNCH_DIR_VARIABLE, str(tmp_path))
    report_ready(0)
    assert report_failure(1, UserError("two\nlines"))
    assert report_failure(0, ValueError("later"))
    assert read_worker_pids(tmp_path) == [os.getpid()]
    first, second = read_failures(tmp_path)
    assert (first.rank, first.is_user_error, first.message) == (1, True, "two\nlines")
    assert second.rank == 0 and not second.is_user_error and "ValueError: later" in second.message


def test_a_signal_before_workers_are_ready_is_left_to_them(monkeypatch, tmp_path):
    monkeypatch.setenv(LAUNCH_DIR_VARIABLE, str(tmp_path))
    assert report_ready(0) == 0
    record_stop_signal(tmp_path, signal.SIGINT)
    assert report_ready(1) == signal.SIGINT
    assert len(read_worker_pids(tmp_path)) == 2


def test_without_a_launcher_nothing_is_reported(monkeypatch):
    monkeypatch.delenv(LAUNCH_DIR_VARIABLE, raising=False)
    report_ready(0)
    assert not report_failure(0, ValueError("printed by the caller"))


def test_launch_imports_no_torch():
    code = "import launch.local, hope_megatron.runtime.process, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_process_knows_when_it_was_started():
    before = time.time()
    code = "import time; time.sleep(0.5); from hope_megatron.runtime.process import process_start_time; print(process_start_time())"
    started = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert before - 0.1 <= started <= time.time() - 0.5  # the kernel counts in hundredths of a second
    assert process_start_time() < before


def test_launch_time_comes_from_the_launcher():
    assert launch_time({LAUNCH_TIME_VARIABLE: "12.5"}) == 12.5
    assert launch_time({}) is None
    assert start_up_text({"launch": 3.0, "first_step": 0.25}) == "3.2 s: launch 3.0, first step 0.2"
