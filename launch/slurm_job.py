"""The supervisor of a Slurm job: it stands in place of the batch script, on the first node.

Time limit and preemption reach it as signals (sbatch --signal=B:USR1@...). After the ranks have saved it puts the job back into
the queue, without the nodes that failed. A job that is requeued after the run has finished does nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from hope_megatron.runtime.failures import ATTEMPT_VARIABLE, LAUNCH_DIR_VARIABLE
from hope_megatron.runtime.process import LAUNCH_TIME_VARIABLE
from hope_megatron.runtime.token import TOKEN_VARIABLE
from launch import slurm
from launch.attempt_runner import STOP_SIGNALS, Supervisor, signal_text
from launch.attempts import STOPPED, UNHEALTHY, Attempt
from launch.health import check_nodes
from launch.step import Step, free_port, srun_command
from launch.submission import LaunchDirectory, read_submission

_END_JOB_S = 120.0


class SlurmJob(Supervisor):
    """Runs one job of a run to its end, or back into the queue."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(
            LaunchDirectory(run_dir),
            read_submission(run_dir),
            own_job_id(os.environ),
            int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            slurm.hostnames(os.environ["SLURM_JOB_NODELIST"]),
        )
        # Of the allocation; of this process on Slurm before 22.05.3, which does not tell.
        self.began = float(os.environ.get("SLURM_JOB_START_TIME", time.time()))

    def begin(self) -> int | None:
        self.say(f"job {self.job_id}, restart {self.restart}, on {' '.join(self.nodes)}")
        if self.is_finished():
            self.say(f"the run has finished all {self.submission.steps} steps; nothing to do")
            return 0
        if self.history.given_up:
            self.say(f"the run was given up: {self.history.given_up}; `{self.command_to_go_on()}` tries again")
            return 1
        self.close_lost_attempt()
        return None

    def may_not_start_here(self) -> int | None:
        limit = self.submission.max_restarts
        if self.history.unhealthy_in_a_row() > limit:
            last = self.history.attempts[-1]
            return self.give_up(
                f"the node check failed in {limit + 1} allocations in a row; the last one: {last.reason}", 1
            )
        avoided = self.history.avoided_nodes(self.submission.max_node_failures)
        if set(avoided) & set(self.nodes):
            self.say(f"avoiding {' '.join(avoided)}, which failed before: back into the queue")
            return self._requeue()
        return None

    def check_nodes(self) -> int | None:
        if self.submission.health is None:
            return None
        started = time.monotonic()
        problems = check_nodes(self.submission, self.nodes, self.directory, lambda: self.stop_signal != 0)
        if self.stop_signal:
            self.history.end(STOPPED, signal_text(self.stop_signal), self.step())
            return self.leave(0)
        if not problems:
            self.say(f"the nodes are well ({time.monotonic() - started:.1f} s)")
            return None
        reason = "; ".join(f"{node}: {problem}" for node, problem in problems.items())
        self.say(f"the node check failed: {reason}")
        self.history.end(UNHEALTHY, reason, self.step(), sorted(problems))
        return self.may_not_start_here()  # gives up, or goes back into the queue without these nodes

    def start_ranks(self) -> Step:
        port = free_port(self.submission.master_ports, int(os.environ["SLURM_JOB_ID"]))
        number = len(self.history.attempts)
        environment = {
            "MASTER_ADDR": self.nodes[0],
            "MASTER_PORT": str(port),
            LAUNCH_DIR_VARIABLE: str(self.directory.reports),
            LAUNCH_TIME_VARIABLE: str(launch_began(self.history.attempts, self.began)),
            ATTEMPT_VARIABLE: attempt_name(self.job_id, number),
            TOKEN_VARIABLE: secrets.token_hex(32),
            "TMPDIR": self.submission.scratch,
        }
        command = srun_command(self.submission, self.nodes, tasks_per_node=self.submission.ranks_per_node)
        command += [
            "--kill-on-bad-exit=1",
            *self.submission.prefix,
            self.submission.python,
            "-m",
            "launch.worker",
            "train",
        ]
        command.append(str(self.directory.config))
        self.say(f"attempt {number}: {self.submission.world_size} ranks from step {self.step()}, port {port}")
        return Step(command, environment, Path(self.submission.code))

    def dead_nodes(self) -> list[str]:
        attempt = self.history.attempts[-1]
        nodes = slurm.show_nodes(attempt.nodes)
        return sorted(name for name, values in nodes.items() if has_gone_down(values, attempt.started))

    def ready(self, seconds: float) -> None:
        self.say(
            f"all ranks are ready, {time.time() - self.began:.1f} s after the job began and {seconds:.1f} s after srun"
        )

    def leave(self, code: int) -> int:
        """Back into the queue, unless Slurm has decided otherwise or the user wants to stop."""
        job = slurm.find_job(self.job_id)
        if job is None or job.state != "RUNNING":
            self.say("Slurm is already ending this job" + (f" ({job.state})" if job is not None else ""))
            return 1
        if self.stop_signal == signal.SIGINT:
            self.say(f"cancelled by the user; `{self.command_to_go_on()}` goes on")
            self._end_job(lambda: slurm.cancel(self.job_id))
            return 130
        return self._requeue()

    def say(self, text: str) -> None:
        """A line in the job's log."""
        with contextlib.suppress(OSError):  # the disk of the log may be full
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} launch: {text}", flush=True)

    def command_to_go_on(self) -> str:
        return f"hope launch resume {self.directory.run_dir}"

    def _requeue(self) -> int:
        """Put the job back into the queue, without the nodes to avoid."""
        avoided = self.history.avoided_nodes(self.submission.max_node_failures)
        self.say("back into the queue" + (f", without {' '.join(avoided)}" if avoided else ""))
        self._end_job(lambda: slurm.requeue(self.job_id, avoided))
        return 0

    def _end_job(self, ask_slurm: Callable[[], None]) -> None:
        """Have Slurm end this very job, and leave only then: leaving earlier would mark the job as completed or failed.

        The Slurm commands belong to the job that they end; they and this process ignore its signals.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        ask_slurm()
        deadline = time.monotonic() + _END_JOB_S
        while (job := slurm.find_job(self.job_id)) is not None and job.state == "RUNNING":
            if time.monotonic() > deadline:
                raise slurm.SlurmError(
                    f"Slurm has not ended job {self.job_id} {_END_JOB_S:.0f} s after it was asked to"
                )
            time.sleep(1.0)


def own_job_id(environment: Mapping[str, str]) -> str:
    """Slurm's id of the job of this process. Tasks of an array are `ARRAY_INDEX`: scancel does not know their own numbers."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def attempt_name(job_id: str, number: int) -> str:
    """A name that no other attempt bears: job numbers begin again on a new cluster, and a killed attempt leaves its heartbeats."""
    return f"{job_id}-{number}-{secrets.token_hex(4)}"


def launch_began(attempts: Sequence[Attempt], allocated: float) -> float:
    """Unix time from which the start of the latest attempt counts: the allocation's, or its own if others came before it there."""
    latest = attempts[-1]
    here = [a for a in attempts if (a.job_id, a.restart) == (latest.job_id, latest.restart)]
    return allocated if len(here) == 1 else latest.started


def has_gone_down(node: dict[str, str], since: float) -> bool:
    """Whether a node, as `scontrol show node` tells, is down or has been started again after a Unix time."""
    if any(word in node.get("State", "") for word in ("DOWN", "FAIL", "ERROR", "NOT_RESPONDING", "*")):
        return True
    try:
        return datetime.fromisoformat(node.get("SlurmdStartTime", "")).timestamp() > since
    except ValueError:
        return False
