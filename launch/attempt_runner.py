"""Runs the attempts of a run to its end: what the supervisors of a Slurm job and of this machine have in common.

A rank that fails is started again with all others from the newest good checkpoint; what stops that is in launch/policy.py. Requests
to stop reach the supervisor as signals; it passes them on, and waits until the ranks have saved. A rank that hangs is found and
ended by the node's watchdog (launch/watchdog.py).

Standard library only: see launch/supervisor.py.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from hope_megatron.runtime.failures import TRANSIENT, Failure, first_cause, read_failures
from hope_megatron.runtime.records import damage_text
from hope_megatron.runtime.reports import read_worker_pids
from launch.attempts import CRASHED, FINISHED, LOST, STOPPED, History, is_finished, last_record, newest_checkpoint_step
from launch.causes import Cause, explain_failure
from launch.hangs import keep_reports, read_hang
from launch.policy import judge
from launch.step import TaskError
from launch.stragglers import slow_nodes
from launch.submission import LaunchDirectory, Submission

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_POLL_S = 0.1
_REPEAT_STOP_S = 10.0
_LOOK_FOR_DEAD_S = 5.0


class Ranks(Protocol):
    """All ranks of an attempt."""

    started: float
    """time.monotonic() of their start."""
    errors: list[TaskError]
    """What is known of those that ended badly."""

    def poll(self) -> int | None:
        """Exit code when all have left, else None."""

    def request_stop(self, number: int) -> None:
        """Ask all to save and leave. `number`: the signal that asked us."""

    def kill(self) -> None:
        """End all, without a word."""


class Supervisor(ABC):
    """Runs the attempts of a run to its end. Subclasses know where the ranks run.

    Args:
        directory: the run's.
        submission: what is run.
        job_id: of the batch system, or what stands for it.
        restart: how often the batch system has started this job again.
        nodes: names of the nodes, in the order of the ranks.
    """

    def __init__(
        self, directory: LaunchDirectory, submission: Submission, job_id: str, restart: int, nodes: Sequence[str]
    ) -> None:
        self.directory, self.submission = directory, submission
        self.job_id, self.restart, self.nodes = job_id, restart, list(nodes)
        self.history = History(directory.attempts)
        self.stop_signal = 0
        """First signal that asked to stop: USR1 (time limit, preemption), TERM (somebody is ending us), INT (the user)."""
        self.began = time.time()
        """Unix time from which the start counts."""
        self.ended_on_request = False
        """Whether the ranks were ended because somebody asked for it, and not because they failed."""

    def run(self) -> int:
        """Exit code of the run."""
        previous = {number: signal.signal(number, self._note_signal) for number in STOP_SIGNALS}
        try:
            if damage := damage_text(self.history.path, self.history.damaged):
                self.say(damage)
            if (code := self.begin()) is not None:
                return code
            while True:
                if (code := self._may_not_start()) is not None:
                    return code
                self.history.start(self.job_id, self.restart, self.nodes, self.step())
                if (code := self.check_nodes()) is not None:
                    return code
                if (code := self._attempt()) is not None:
                    return code
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # -- what subclasses know --------------------------------------------------------------------------------------

    def begin(self) -> int | None:
        """Before the first attempt. Exit code if none shall be made."""
        return None

    def may_not_start_here(self) -> int | None:
        """Exit code if these nodes shall not be used."""
        return None

    def check_nodes(self) -> int | None:
        """Exit code if the nodes are not well, or the run has been asked to stop meanwhile."""
        return None

    @abstractmethod
    def start_ranks(self) -> Ranks:
        """Start all ranks of the latest attempt."""

    def dead_nodes(self) -> list[str]:
        """Nodes of the latest attempt that are down, or have been started again since it began."""
        return []

    @abstractmethod
    def leave(self, code: int) -> int:
        """After the ranks have stopped because they were asked to. `code`: the exit code of the ranks."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Tell the user, or the log."""

    @abstractmethod
    def command_to_go_on(self) -> str:
        """What to type to continue the run."""

    def failed(self, cause: Cause, failure: Failure | None) -> None:
        """An attempt has failed."""
        if failure is not None and not failure.is_user_error and not failure.lost_peer:
            print(failure.message, file=sys.stderr, flush=True)

    def give_up(self, reason: str, code: int) -> int:
        """No further attempt will be made; returns the exit code."""
        self.history.give_up(reason)
        self.say(f"giving up: {reason}\nOnce that is mended, go on with: {self.command_to_go_on()}")
        return code

    # -- an attempt ------------------------------------------------------------------------------------------------

    def _may_not_start(self) -> int | None:
        if self.stop_signal:
            return self.leave(0)
        verdict = judge(self.history, self.submission.max_restarts, self.submission.max_transient_restarts)
        if verdict.stop:
            return self.give_up(verdict.stop, 1)
        if (code := self.may_not_start_here()) is not None:
            return code
        self._pause(verdict.delay_s)
        return self.leave(0) if self.stop_signal else None

    def _attempt(self) -> int | None:
        """Run the ranks once. Returns the exit code of the run, or None to try again."""
        shutil.rmtree(self.directory.reports, ignore_errors=True)
        self.directory.reports.mkdir(parents=True, exist_ok=True)
        before = self.step()
        ranks = self.start_ranks()
        try:
            self._watch(ranks)
        except BaseException:
            ranks.kill()
            raise
        code, checkpoint = ranks.poll(), self.step()
        assert code is not None
        if self.is_finished() or (code == 0 and checkpoint >= self.submission.steps):
            self.history.end(FINISHED, "", checkpoint)
            return self.finished()
        if self.ended_on_request or (code == 0 and (self.stop_signal or checkpoint > before)):
            self.history.end(STOPPED, signal_text(self.stop_signal), checkpoint, slow_nodes=self._slow_nodes())
            self.say(f"the ranks have stopped; newest checkpoint: step {checkpoint}")
            return self.leave(code)
        return self._failed(ranks, checkpoint, code)

    def finished(self) -> int:
        """All steps are done; the exit code."""
        self.say(f"finished: all {self.submission.steps} steps are done")
        return 0

    def _failed(self, ranks: Ranks, checkpoint: int, code: int) -> int | None:
        detected = time.time()
        failures = read_failures(self.directory.reports)
        failure, hang = first_cause(failures), read_hang(self.directory.reports)
        cause = explain_failure(failure, hang, ranks.errors, self.submission.ranks_per_node, self.nodes)
        if down := self.dead_nodes():
            cause = Cause(f"{' '.join(down)} went down", TRANSIENT, down)
        steps = [item.step for item in failures] + [
            hang.step if hang else 0,
            last_recorded_step(self.directory.run_dir),
        ]
        more: dict[str, Any] = {
            "kind": cause.kind,
            "signature": cause.signature,
            "furthest": max(steps),
            "detected": detected,
            "slow_nodes": self._slow_nodes(),
        }
        self.history.end(CRASHED, cause.text, checkpoint, cause.bad_nodes, **more)
        self.failed(cause, failure)
        number = len(self.history.attempts)
        if hang is not None:
            kept = self.directory.path / "hangs" / f"attempt-{number:04d}"
            with contextlib.suppress(OSError):
                keep_reports(self.directory.reports, kept)
                self.say(f"the stacks of all ranks are in {kept}")
        self.say(f"attempt {number} failed, newest checkpoint: step {checkpoint}: {cause.text}")
        if self.stop_signal:
            return self.leave(code)
        if failure is not None and failure.is_user_error:
            return self.give_up(cause.text, code=2)
        return None

    def _slow_nodes(self) -> list[str]:
        """The node of a rank that was slow to the end of this attempt, if such nodes are left out."""
        if not self.submission.leave_out_slow_nodes:
            return []
        began_at = self.history.attempts[-1].step
        found = slow_nodes(self.directory.run_dir, began_at, self.submission.ranks_per_node, self.nodes)
        if found:
            self.say(f"leaving out {' '.join(found)}, which was slow to the end")
        return found

    def _watch(self, ranks: Ranks) -> None:
        """Wait until the ranks have left. A request to stop is repeated: ranks that are starting up do not hear it."""
        ready = told = False
        ask_at = look_at = 0.0
        while ranks.poll() is None:
            now = time.monotonic()
            if not ready and len(read_worker_pids(self.directory.reports)) == self.submission.world_size:
                ready, ask_at = True, now
                self.ready(now - ranks.started)
            if self.stop_signal and now >= ask_at:
                if not told:
                    self.say(f"{signal_text(self.stop_signal)}: asking the ranks to save and stop")
                ranks.request_stop(self.stop_signal)
                told, ask_at = True, now + _REPEAT_STOP_S
            if ranks.errors and now >= look_at:
                # srun waits for ever for the tasks of a node that died and came back before Slurm noticed.
                if down := self.dead_nodes():
                    self.say(f"{' '.join(down)} went down: ending what is left")
                    ranks.kill()
                look_at = now + _LOOK_FOR_DEAD_S
            time.sleep(_POLL_S)

    def ready(self, seconds: float) -> None:  # noqa: B027 (not every place says it)
        """All ranks listen for signals, so many seconds after their start."""

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stop_signal:
            time.sleep(_POLL_S)

    def is_finished(self) -> bool:
        """Whether the run says that all steps are done."""
        return is_finished(self.directory.run_dir, self.submission.steps)

    def step(self) -> int:
        """Step of the newest checkpoint."""
        return newest_checkpoint_step(self.directory.run_dir)

    def close_lost_attempt(self) -> None:
        """Account for an attempt that a dead node, or a kill without notice, cut off."""
        if not self.history.attempts or self.history.attempts[-1].ended is not None:
            return
        lost = self.history.attempts[-1]
        bad = self.dead_nodes()
        reason = f"job {lost.job_id} was cut off" + (f": {' '.join(bad)} went down" if bad else "")
        furthest = last_recorded_step(self.directory.run_dir)
        self.history.end(LOST, reason, self.step(), bad, kind=TRANSIENT, furthest=furthest)
        self.say(f"the attempt before: {reason}")

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = self.stop_signal or number


def last_recorded_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    return int(last_record(run_dir).get("step", 0))


def signal_text(number: int) -> str:
    """What a signal to the supervisor means."""
    meaning = {
        signal.SIGUSR1: "time limit or preemption",
        signal.SIGTERM: "Slurm ends the job",
        signal.SIGINT: "cancelled",
    }
    return meaning.get(signal.Signals(number), signal.Signals(number).name) if number else "stopped"
