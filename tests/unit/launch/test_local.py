"""Refusals before any process is started, and what is said of a rank that was killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from hope_megatron.cli.main import main
from hope_megatron.runtime.process import available_cpus
from launch.errors import LaunchError
from launch.local import LocalRun, run_local, run_supervised
from launch.submission import LaunchDirectory, Submission


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_more_processes_than_cores_are_refused():
    with pytest.raises(LaunchError, match=r"--nproc 1000.*--oversubscribe"):
        run_local(["train"], 1000)


def test_no_process_at_all_is_refused(capsys):
    with pytest.raises(LaunchError, match="at least one"):
        run_local(["train"], 0)
    assert main(["train", "hope_tiny_cpu", "--nproc", "0", "--dry-run"]) == 2
    assert capsys.readouterr().err == "error: --nproc 0: a run needs at least one process\n"


def test_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=f"--port {port} cannot be used"):
            run_supervised(["train"], available_cpus(), tmp_path, name="x", steps=1, port=port)


RANK = """
import os, signal, time
from hope_megatron.runtime.heartbeat import HEART, attach_heartbeat
rank = int(os.environ["RANK"])
attach_heartbeat(rank)
if rank == 0:
    time.sleep(60)
HEART.begin_step({step})
HEART.enter("forward")
os.kill(os.getpid(), signal.SIGKILL)
"""


class Killed:
    """Starts ranks of which the second is killed in a step, as the system does when memory runs out."""

    def __init__(self, step: int) -> None:
        self.step = step

    def start(self, argv, environment):
        return subprocess.Popen([sys.executable, "-c", RANK.format(step=self.step)], env={**os.environ, **environment})

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("step", "where"), [(7, "Killed in step 7, phase forward"), (0, "Killed before the first step")]
)
def test_a_killed_rank_is_named_with_its_step_and_the_way_on(tmp_path, monkeypatch, capsys, step, where):
    monkeypatch.setattr("launch.local._PEERS_S", 0.0)
    (tmp_path / "checkpoints/step-00000006").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000006/manifest.json").write_text("{}")
    submission = Submission(
        name="x", steps=9, nodes=1, ranks_per_node=2, cpus_per_process=1, gpus_per_node=0, code=".", python=sys.executable,
        max_restarts=0, max_transient_restarts=0,
    )  # fmt: skip
    run = LocalRun(["train", "x.yaml"], submission, LaunchDirectory(tmp_path), {}, None, Killed(step))
    assert run.run() != 0
    *_, last, way = capsys.readouterr().err.splitlines()
    assert last.startswith("error: attempt 1 was the last (newest checkpoint: step 6): ") and "rank 1 on " in last
    assert f"{where} (the system does that when memory runs out)" in last
    assert way == "Go on with: hope train x.yaml"
    capsys.readouterr()
    assert main(["launch", "status", str(tmp_path), "--json"]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert (status["state"], status["attempts"], status["checkpoint"], status["steps"]) == ("gave up", 1, 6, 9)


def test_a_chain_says_its_links_as_json(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text('{"step": 9, "complete": true}')
    link = {"name": "train", "job_id": "7", "log": "l.log", "run_dir": str(tmp_path / "run"), "steps": 9}
    (tmp_path / "chain.json").write_text(json.dumps({"links": [link]}))
    assert main(["launch", "status", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {"name": "train", "state": "completed", "because": "", "job_id": "7", "log": "l.log"}
