"""The process of a job that never trains: it starts the ranks, watches them, and decides what follows.

It runs on the first node, in place of the batch script. Time limit and preemption reach it as signals (sbatch
--signal=B:USR1@...); it passes them on, waits until the ranks have saved, and puts the job back into the queue. A rank that
fails is restarted in the same allocation; a run that fails again and again without a newer checkpoint is given up, with the
reason in the log. A job that is requeued after the run has finished does nothing.

Standard library only, so that it can run outside of the container in which the ranks run.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType

from hope_megatron.runtime.process import LAUNCH_TIME_VARIABLE
from hope_megatron.runtime.reports import LAUNCH_DIR_VARIABLE, Failure, read_failures, read_worker_pids
from launch import slurm
from launch.attempts import (
    CRASHED,
    FINISHED,
    LOST,
    STOPPED,
    UNHEALTHY,
    Attempt,
    History,
    is_finished,
    newest_checkpoint_step,
)
from launch.health import check_nodes
from launch.step import Step, TaskError, free_port, srun_command
from launch.submission import LaunchDirectory, read_submission

_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_POLL_S = 0.2
_REPEAT_STOP_S = 10.0
_LOOK_FOR_DEAD_S = 5.0
_END_JOB_S = 120.0
_MAX_RESTART_DELAY_S = 60.0


class Supervisor:
    """Runs one job of a run to its end, or back into the queue."""

    def __init__(self, run_dir: Path) -> None:
        self.began = float(os.environ.get("SLURM_JOB_START_TIME", time.time()))
        """Unix time of the allocation (of this process on Slurm before 22.05.3, which does not tell)."""
        self.directory = LaunchDirectory(run_dir)
        self.submission = read_submission(run_dir)
        self.history = History(self.directory.attempts)
        self.job_id = own_job_id(os.environ)
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.nodes = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
        self.stop_signal = 0
        """First signal that asked to stop: USR1 (time limit, preemption), TERM (Slurm is ending us), INT (the user)."""

    def run(self) -> int:
        """Exit code of the job."""
        for number in _STOP_SIGNALS:
            signal.signal(number, self._note_signal)
        say(f"job {self.job_id}, restart {self.restart}, on {' '.join(self.nodes)}")
        if self._is_finished():
            say(f"the run has finished all {self.submission.steps} steps; nothing to do")
            return 0
        if self.history.given_up:
            say(
                f"the run was given up: {self.history.given_up}; `hope launch resume {self.directory.run_dir}` tries again"
            )
            return 1
        self._close_lost_attempt()
        while True:
            if (code := self._may_not_start()) is not None:
                return code
            self.history.start(self.job_id, self.restart, self.nodes, self._step())
            if (code := self._check_health()) is not None:
                return code
            if (code := self._attempt()) is not None:
                return code
            self._pause()

    def _may_not_start(self) -> int | None:
        """Exit code if another attempt must not be made here and now."""
        if self.stop_signal:
            return self._leave()
        failures, limit = self.history.failures_without_progress(self._step()), self.submission.max_restarts
        if failures > limit:
            last = self.history.attempts[-1]
            return self._give_up(
                f"{failures} attempts failed without a checkpoint newer than step {self._step()} (max_restarts={limit}); "
                f"the last one: {last.reason}"
            )
        if self.history.unhealthy_in_a_row() > limit:
            last = self.history.attempts[-1]
            return self._give_up(
                f"the node check failed in {limit + 1} allocations in a row; the last one: {last.reason}"
            )
        avoided = self.history.avoided_nodes(self.submission.max_node_failures)
        if set(avoided) & set(self.nodes):
            say(f"avoiding {' '.join(avoided)}, which failed before: back into the queue")
            return self._requeue()
        return None

    def _check_health(self) -> int | None:
        """Exit code if the nodes are not well, or the job has been asked to stop meanwhile."""
        if self.submission.health is None:
            return None
        started = time.monotonic()
        problems = check_nodes(self.submission, self.nodes, self.directory, lambda: self.stop_signal != 0)
        if self.stop_signal:
            self.history.end(STOPPED, signal_text(self.stop_signal), self._step())
            return self._leave()
        if not problems:
            say(f"the nodes are well ({time.monotonic() - started:.1f} s)")
            return None
        reason = "; ".join(f"{node}: {problem}" for node, problem in problems.items())
        say(f"the node check failed: {reason}")
        self.history.end(UNHEALTHY, reason, self._step(), sorted(problems))
        return self._may_not_start()  # gives up, or goes back into the queue without these nodes

    def _attempt(self) -> int | None:
        """Run the ranks once. Returns the job's exit code, or None to try again."""
        shutil.rmtree(self.directory.reports, ignore_errors=True)
        self.directory.reports.mkdir(parents=True)
        before = self._step()
        step = self._start_ranks(free_port(self.submission.master_ports, int(os.environ["SLURM_JOB_ID"])))
        self._watch(step)
        code, checkpoint = step.poll(), self._step()
        if self._is_finished() or (code == 0 and checkpoint >= self.submission.steps):
            self.history.end(FINISHED, "", checkpoint)
            say(f"finished: all {self.submission.steps} steps are done")
            return 0
        if code == 0 and (self.stop_signal or checkpoint > before):
            self.history.end(STOPPED, signal_text(self.stop_signal), checkpoint)
            say(f"the ranks have stopped; newest checkpoint: step {checkpoint}")
            return self._leave()
        cause = first_cause(read_failures(self.directory.reports))
        reason, bad_nodes = explain_failure(cause, step.errors, self.submission.ranks_per_node, self.nodes)
        if down := self._dead_nodes():
            reason, bad_nodes = f"{' '.join(down)} went down", down
        self.history.end(CRASHED, reason, checkpoint, bad_nodes)
        if cause is not None:
            print(cause.message, file=sys.stderr, flush=True)
        say(f"attempt {len(self.history.attempts)} failed, newest checkpoint: step {checkpoint}: {reason}")
        if self.stop_signal:
            return self._leave()
        if cause is not None and cause.is_user_error and self.history.is_first_attempt:
            return self._give_up(f"the first attempt ended with: {cause.message}", code=2)
        return None

    def _start_ranks(self, port: int) -> Step:
        environment = {
            "MASTER_ADDR": self.nodes[0],
            "MASTER_PORT": str(port),
            LAUNCH_DIR_VARIABLE: str(self.directory.reports),
            LAUNCH_TIME_VARIABLE: str(launch_began(self.history.attempts, self.began)),
            "TMPDIR": self.submission.scratch,
        }
        command = srun_command(self.submission, self.nodes, tasks_per_node=self.submission.ranks_per_node)
        command += [
            "--kill-on-bad-exit=1",
            self.submission.python,
            "-m",
            "launch.worker",
            "train",
            str(self.directory.config),
        ]
        say(
            f"attempt {len(self.history.attempts)}: {self.submission.world_size} ranks from step {self._step()}, port {port}"
        )
        return Step(command, environment, Path(self.submission.code))

    def _watch(self, step: Step) -> None:
        """Wait until the ranks have left. A request to stop is repeated: ranks that are starting up do not hear it."""
        ready = told = False
        ask_at = look_at = 0.0
        while step.poll() is None:
            now = time.monotonic()
            if not ready and len(read_worker_pids(self.directory.reports)) == self.submission.world_size:
                ready, ask_at = True, now
                since_start = f"{now - step.started:.1f} s after srun"
                say(f"all ranks are ready, {time.time() - self.began:.1f} s after the job began and {since_start}")
            if self.stop_signal and now >= ask_at:
                if not told:
                    say(f"{signal_text(self.stop_signal)}: asking the ranks to save and stop")
                step.request_stop()
                told, ask_at = True, now + _REPEAT_STOP_S
            if step.errors and now >= look_at:
                # srun waits for ever for the tasks of a node that died and came back before Slurm noticed.
                if down := self._dead_nodes():
                    say(f"{' '.join(down)} went down: ending what is left")
                    step.kill()
                look_at = now + _LOOK_FOR_DEAD_S
            time.sleep(_POLL_S)

    def _leave(self) -> int:
        """After the ranks have stopped: back into the queue, unless Slurm has decided otherwise or the user wants to stop."""
        job = slurm.find_job(self.job_id)
        if job is None or job.state != "RUNNING":
            say(
                "Slurm is already ending this job" if job is None else f"Slurm is already ending this job ({job.state})"
            )
            return 1
        if self.stop_signal == signal.SIGINT:
            say(f"cancelled by the user; `hope launch resume {self.directory.run_dir}` goes on")
            self._end_job(lambda: slurm.cancel(self.job_id))
            return 130
        return self._requeue()

    def _requeue(self) -> int:
        """Put the job back into the queue, without the nodes to avoid."""
        avoided = self.history.avoided_nodes(self.submission.max_node_failures)
        say("back into the queue" + (f", without {' '.join(avoided)}" if avoided else ""))
        self._end_job(lambda: slurm.requeue(self.job_id, avoided))
        return 0

    def _end_job(self, ask_slurm: Callable[[], None]) -> None:
        """Have Slurm end this very job, and leave only then: leaving earlier would mark the job as completed or failed.

        The Slurm commands belong to the job that they end; they and this process ignore its signals.
        """
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        ask_slurm()
        deadline = time.monotonic() + _END_JOB_S
        while (job := slurm.find_job(self.job_id)) is not None and job.state == "RUNNING":
            if time.monotonic() > deadline:
                raise slurm.SlurmError(
                    f"Slurm has not ended job {self.job_id} {_END_JOB_S:.0f} s after it was asked to"
                )
            time.sleep(1.0)

    def _give_up(self, reason: str, code: int = 1) -> int:
        self.history.give_up(reason)
        say(f"giving up: {reason}")
        return code

    def _close_lost_attempt(self) -> None:
        """Account for an attempt that a dead node, or a kill without notice, cut off."""
        if not self.history.attempts or self.history.attempts[-1].ended is not None:
            return
        lost = self.history.attempts[-1]
        bad = self._dead_nodes()
        reason = f"job {lost.job_id} was cut off" + (f": {' '.join(bad)} went down" if bad else "")
        self.history.end(LOST, reason, self._step(), bad)
        say(f"the attempt before: {reason}")

    def _dead_nodes(self) -> list[str]:
        """Nodes of the latest attempt that are down, or have been started again since it began."""
        attempt = self.history.attempts[-1]
        nodes = slurm.show_nodes(attempt.nodes)
        return sorted(name for name, values in nodes.items() if has_gone_down(values, attempt.started))

    def _pause(self) -> None:
        """Give a fault that affects several restarts time to pass: 2 s, doubling with each failure."""
        failures = self.history.failures_without_progress(self._step())
        deadline = time.monotonic() + min(2.0 ** max(failures, 1), _MAX_RESTART_DELAY_S)
        while time.monotonic() < deadline and not self.stop_signal:
            time.sleep(_POLL_S)

    def _is_finished(self) -> bool:
        return is_finished(self.directory.run_dir, self.submission.steps)

    def _step(self) -> int:
        return newest_checkpoint_step(self.directory.run_dir)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = self.stop_signal or number


def own_job_id(environment: Mapping[str, str]) -> str:
    """Slurm's id of the job of this process. Tasks of an array are `ARRAY_INDEX`: scancel does not know their own numbers."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def launch_began(attempts: Sequence[Attempt], allocated: float) -> float:
    """Unix time from which the start of the latest attempt counts: the allocation's, or its own if others came before it there."""
    latest = attempts[-1]
    here = [a for a in attempts if (a.job_id, a.restart) == (latest.job_id, latest.restart)]
    return allocated if len(here) == 1 else latest.started


def first_cause(failures: Sequence[Failure]) -> Failure | None:
    """The report of the rank that failed first; a user's mistake comes before everything. Later ones lost their peer."""
    return next((failure for failure in failures if failure.is_user_error), failures[0] if failures else None)


def explain_failure(
    cause: Failure | None, errors: Sequence[TaskError], ranks_per_node: int, nodes: Sequence[str]
) -> tuple[str, list[str]]:
    """Why an attempt failed, and the nodes it is put down to.

    A rank that a signal killed comes first: the others then fail because they lost it. A node is to blame for killed ranks
    and for errors of its GPUs, not for exceptions of the program.
    """
    killed = [error for error in errors if error.by_signal and not error.what.startswith("Terminated")]
    if killed and not (cause is not None and cause.is_user_error):
        return str(killed[0]), [killed[0].node]
    if cause is not None:
        node = nodes[min(cause.rank // ranks_per_node, len(nodes) - 1)]
        lines = cause.message.strip().splitlines() or ["no message"]
        return f"rank {cause.rank} on {node}: {lines[-1]}", [node] if "CUDA error" in cause.message else []
    return str(errors[0]) if errors else "the ranks left without a reason", []


def has_gone_down(node: dict[str, str], since: float) -> bool:
    """Whether a node, as `scontrol show node` tells, is down or has been started again after a Unix time."""
    if any(word in node.get("State", "") for word in ("DOWN", "FAIL", "ERROR", "NOT_RESPONDING", "*")):
        return True
    try:
        return datetime.fromisoformat(node.get("SlurmdStartTime", "")).timestamp() > since
    except ValueError:
        return False


def signal_text(number: int) -> str:
    """What a signal to the supervisor means."""
    meaning = {
        signal.SIGUSR1: "time limit or preemption",
        signal.SIGTERM: "Slurm ends the job",
        signal.SIGINT: "cancelled",
    }
    return meaning.get(signal.Signals(number), signal.Signals(number).name) if number else "stopped"


def say(text: str) -> None:
    """A line in the job's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} launch: {text}", flush=True)


def main() -> int:
    """`python -m launch.supervisor RUN_DIR`"""
    return Supervisor(Path(sys.argv[1]).resolve()).run()


if __name__ == "__main__":
    sys.exit(main())
