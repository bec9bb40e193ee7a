"""What the supervisor concludes from a failure: the cause, and the node that it is put down to."""

from __future__ import annotations

import os
import socket
import time
from datetime import datetime
from pathlib import Path

import pytest

from hope_megatron.runtime.failures import CRASH, TRANSIENT, USER, Failure, first_cause
from launch.attempts import Attempt
from launch.causes import explain_failure
from launch.errors import LaunchError
from launch.hangs import Hang
from launch.slurm import parse_job
from launch.slurm_job import attempt_name, has_gone_down, launch_began
from launch.step import TaskError, free_port, srun_command
from launch.submission import Submission
from launch.worker import heartbeat_directory, rank_environment

NODES = ["node1", "node2"]
LOST_PEER = Failure(
    0, 2.0, TRANSIENT, "RuntimeError: Connection closed by peer", step=7, phase="backward", lost_peer=True
)


def test_a_killed_rank_explains_the_ranks_that_lost_it() -> None:
    errors = [TaskError("node1", "0", "Exited with exit code 1"), TaskError("node2", "3", "Killed")]
    cause = explain_failure(LOST_PEER, None, errors, 2, NODES)
    assert cause.text == (
        "rank 3 on node2: Killed (the system does that when memory runs out) "
        "(phase backward of step 7 on the ranks that lost it)"
    )
    assert (cause.kind, cause.bad_nodes) == (TRANSIENT, ["node2"])


def test_tasks_that_slurm_terminated_are_not_the_cause() -> None:
    cause = explain_failure(LOST_PEER, None, [TaskError("node2", "2-3", "Terminated")], 2, NODES)
    assert cause.text == "rank 0 on node1, step 7, phase backward: RuntimeError: Connection closed by peer"
    assert cause.bad_nodes == []


def test_a_gpu_error_is_put_down_to_its_node() -> None:
    message = "Traceback ...\nAcceleratorError: CUDA error: uncorrectable ECC error encountered"
    cause = explain_failure(Failure(3, 1.0, TRANSIENT, message), None, [], 2, NODES)
    assert "rank 3 on node2" in cause.text and "uncorrectable ECC" in cause.text
    assert cause.bad_nodes == ["node2"]


def test_a_user_error_comes_before_everything() -> None:
    failure = Failure(1, 5.0, USER, "the tokenizer is another one")
    cause = explain_failure(first_cause([LOST_PEER, failure]), None, [TaskError("node1", "0", "Killed")], 1, NODES)
    assert (cause.text, cause.kind, cause.bad_nodes) == ("the tokenizer is another one", USER, [])


def test_an_exception_explains_a_rank_that_the_launcher_killed_after_it() -> None:
    failure = Failure(
        1, 5.0, CRASH, "Traceback\nValueError: no", step=3, phase="step", signature="ValueError at x.py:1"
    )
    cause = explain_failure(failure, None, [TaskError("node1", "0", "Killed")], 1, NODES)
    assert cause.text == "rank 1 on node2, step 3, phase step: ValueError: no"
    assert (cause.kind, cause.signature) == (CRASH, "ValueError at x.py:1")


def test_a_hang_is_put_down_to_the_node_of_the_rank_that_is_behind() -> None:
    hang = Hang(3, "node2", 9, "forward", "rank 3 on node2 hangs at step 9: stopped by a signal")
    cause = explain_failure(LOST_PEER, hang, [TaskError("node1", "0-1", "Killed")], 2, NODES)
    assert (cause.text, cause.kind, cause.bad_nodes) == (hang.text, TRANSIENT, ["node2"])


def test_silence_is_said() -> None:
    assert explain_failure(first_cause([]), None, [], 1, NODES).text == "the ranks left without a reason"


@pytest.mark.parametrize(
    ("state", "started", "down"),
    [("IDLE", -100, False), ("DOWN+NOT_RESPONDING", -100, True), ("MIXED*", -100, True), ("ALLOCATED", 100, True)],
)
def test_nodes_that_went_down(state: str, started: float, down: bool) -> None:
    now = time.time()
    node = {"State": state, "SlurmdStartTime": datetime.fromtimestamp(now + started).isoformat(timespec="seconds")}
    assert has_gone_down(node, since=now) is down
    assert not has_gone_down({"State": "IDLE", "SlurmdStartTime": "None"}, since=now)


def test_a_port_that_is_taken_is_left_out() -> None:
    low, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert free_port(None, 7) == free_port(None, 7) < low, "of those that no connection is given"
    assert free_port(None, 8) != free_port(None, 7)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port((port, port + 20), 21 * port) != port
        assert free_port((port, port + 20), 1) > port
        with pytest.raises(LaunchError, match=r"master_ports=.* is free"):
            free_port((port, port), 7)


def test_srun_says_everything_itself() -> None:
    submission = Submission(
        name="x", steps=1, nodes=2, ranks_per_node=4, cpus_per_process=3, gpus_per_node=4, code="/c", python="python",
        srun_options=("--container-image=i",),
    )  # fmt: skip
    command = srun_command(submission, NODES, tasks_per_node=4)
    for option in (
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--cpus-per-task=3",
        "--nodelist=node1,node2",
        "--container-image=i",
    ):
        assert option in command
    assert submission.world_size == 8


def test_rank_variables_come_from_slurm() -> None:
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }
    assert rank_environment(slurm) == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


def test_heartbeats_of_a_killed_attempt_do_not_pass_for_those_of_the_next_job_of_its_number() -> None:
    """On a new cluster job 33 comes again. A watchdog that finds the dead ranks of the old one leaves at once."""
    names = {attempt_name("33", 1) for _ in range(10)}
    assert len(names) == 10
    found = {heartbeat_directory({"HOPE_ATTEMPT": name, "SLURMD_NODENAME": "node1"}) for name in names}
    assert len(found) == 10 and all(path.name.startswith(f"hope-{os.getuid()}-33-1-") for path in found)


def test_jobs_are_read_from_scontrol() -> None:
    line = "JobId=12 JobName=a UserId=root(0) JobState=PENDING Reason=Resources Restarts=2 StartTime=Unknown NodeList=(null)"
    job = parse_job(line)
    assert (job.job_id, job.state, job.reason, job.nodes, job.restarts, job.ended) == (
        "12",
        "PENDING",
        "Resources",
        "",
        2,
        False,
    )
    cell = parse_job("JobId=14 ArrayJobId=13 ArrayTaskId=1 JobState=CANCELLED Reason=None NodeList=n1")
    assert (cell.job_id, cell.ended, cell.reason) == ("13_1", True, "")
    assert parse_job("JobId=13 ArrayJobId=13 ArrayTaskId=0-3%2 JobState=PENDING").job_id == "13"


def test_start_up_counts_from_the_allocation_or_from_the_attempt_after_a_failure() -> None:
    def attempt(number: int, restart: int) -> Attempt:
        return Attempt(number, "7", restart, ("n1",), started=100.0 * number, step=0)

    assert launch_began([attempt(1, 0)], allocated=40.0) == 40.0
    assert launch_began([attempt(1, 0), attempt(2, 0)], allocated=40.0) == 200.0
    assert launch_began([attempt(1, 0), attempt(2, 1)], allocated=160.0) == 160.0
