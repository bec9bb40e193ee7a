"""Refusals before any process is started, and what is said when one has died."""

from __future__ import annotations

import socket

import pytest

from hope_megatron.cli.train import how_to_resume
from hope_megatron.runtime.process import available_cpus
from hope_megatron.training.metrics import MetricsFile
from hope_megatron.training.run_directory import RunDirectory
from launch.errors import LaunchError
from launch.local import _Death, _print_failure, run_local


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_more_processes_than_cores_are_refused():
    with pytest.raises(LaunchError, match=r"--nproc 1000.*--oversubscribe"):
        run_local(["train"], 1000)


def test_no_process_at_all_is_refused():
    with pytest.raises(LaunchError, match="at least one"):
        run_local(["train"], 0)


def test_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=f"--port {port} cannot be used"):
            run_local(["train"], available_cpus(), port=port)


@pytest.mark.parametrize(
    ("died", "reports", "words"),
    [
        (
            _Death(1, 137, 9),
            {},
            "error: rank 1 was killed by SIGKILL; the system does that when memory runs out; it can go on",
        ),
        (_Death(0, 139, 11), {}, "error: rank 0 was killed by SIGSEGV; it can go on"),
        (_Death(2, 3, 0), {}, "error: rank 2 ended with exit code 3 and without a message; it can go on"),
        # The other rank reports that it lost its peer: the one that was killed is the cause.
        (_Death(1, 137, 9), {0: "1.0\n0\nconnection closed by peer\n"}, "error: rank 1 was killed by SIGKILL"),
        (_Death(0, 2, 0), {0: "1.0\n1\nunknown key x"}, "error: unknown key x"),
        (_Death(0, 1, 0), {0: "1.0\n0\nTraceback ...\n"}, "error: rank 0 failed as shown above"),
    ],
)
def test_the_rank_that_died_is_named_with_the_way_on(tmp_path, capsys, died, reports, words):
    for rank, text in reports.items():
        (tmp_path / f"failure-{rank}.txt").write_text(text)
    _print_failure(tmp_path, died, lambda: "it can go on")
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(words) and error.count("error:") == 1


def test_the_step_and_the_checkpoint_are_said(tmp_path):
    directory = RunDirectory(tmp_path)
    assert (
        how_to_resume(directory)
        == "the last recorded step was 0; the same command begins again: there is no checkpoint yet"
    )
    MetricsFile(directory.metrics).append(7, {"train/loss": 1.0})
    for step in (3, 6):
        (directory.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    assert how_to_resume(directory) == (
        f"the last recorded step was 7; the same command goes on from {directory.checkpoints}/step-00000006"
    )
