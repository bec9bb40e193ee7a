"""Training processes on this machine: started, watched, ended and started again by this very process.

Signals stay in one hand: ranks live in sessions of their own, so Ctrl-C reaches only this process, which passes it on once. The
ranks then agree on a last step, save and leave by themselves; a second Ctrl-C ends them at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from hope_megatron.runtime.failures import LAUNCH_DIR_VARIABLE, Failure, first_cause, read_failures
from hope_megatron.runtime.heartbeat import HEARTBEAT_DIR_VARIABLE, Limits, beat_file, read_beat
from hope_megatron.runtime.process import (
    LAUNCH_TIME_VARIABLE,
    SUPERVISOR_VARIABLE,
    available_cpus,
    count_gpus,
    process_environment,
)
from hope_megatron.runtime.reports import read_worker_pids, record_stop_signal
from hope_megatron.runtime.token import TOKEN_VARIABLE
from launch.attempt_runner import Supervisor
from launch.causes import Cause
from launch.errors import LaunchError
from launch.processes import FreshProcesses, Nursery, Starter
from launch.step import TaskError, free_port
from launch.submission import LaunchDirectory, Submission, write_submission

_PEERS_S = 8.0
"""So long the others may take to report and leave after a rank has failed; then they are ended."""
_NAMES = {9: "Killed", 15: "Terminated", 11: "Segmentation fault", 7: "Bus error", 6: "Aborted"}


class LocalRanks:
    """Ranks of one world on this machine, and the watchdog that looks after them.

    Args:
        argv: command line of each rank, without the program.
        nproc: number of ranks.
        reports: directory through which they report.
        environment: variables of all ranks, beside this process's own.
        starter: starts the processes.
        port: rendezvous port on the loopback interface; None: a free one.
    """

    def __init__(
        self,
        argv: Sequence[str],
        nproc: int,
        reports: Path,
        environment: dict[str, str],
        starter: Starter,
        port: int | None = None,
    ) -> None:
        self.started = time.monotonic()
        self.errors: list[TaskError] = []
        self.reports = reports
        self._beats = Path(tempfile.mkdtemp(prefix="hope-beats-", dir=_memory_directory()))
        common = {
            **environment,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port or free_port(None, os.getpid(), "127.0.0.1")),
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            LAUNCH_DIR_VARIABLE: str(reports),
            HEARTBEAT_DIR_VARIABLE: str(self._beats),
            TOKEN_VARIABLE: secrets.token_hex(32),
            SUPERVISOR_VARIABLE: str(os.getpid()),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
        self._ranks = [
            starter.start(argv, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(nproc)
        ]
        watch = [str(self._beats), str(reports), socket.gethostname(), str(nproc), "1", str(Limits().start_up_s)]
        self._watchdog = subprocess.Popen([sys.executable, "-m", "launch.watchdog", *watch], start_new_session=True)
        self._codes: dict[int, int] = {}
        self._end_at = 0.0

    def poll(self) -> int | None:
        """Exit code when all ranks have left: that of the first one that failed, or 0; else None."""
        for rank, process in enumerate(self._ranks):
            code = process.poll()
            if code is None or rank in self._codes:
                continue
            self._codes[rank] = code
            if code and not self._end_at:
                self._end_at = time.monotonic() + _PEERS_S
            if code < 0:
                self._note_error(rank, _NAMES.get(-code, f"signal {-code}"))
            elif code:
                self._note_error(rank, f"Exited with exit code {code}")
        if self._end_at and time.monotonic() > self._end_at:
            self.kill()
        if len(self._codes) < len(self._ranks):
            return None
        self._clean()
        codes = [code for code in self._codes.values() if code]
        return (codes[0] if codes[0] > 0 else 128 - codes[0]) if codes else 0

    def _note_error(self, rank: int, what: str) -> None:
        """Where it was is in its heartbeat, which outlives it."""
        beat = read_beat(beat_file(self._beats, rank))
        where = f" in step {beat.step}, phase {beat.phase}" if beat and beat.step else " before the first step"
        if beat is None and not self._beats.exists():  # the watchdog was faster: it has seen all ranks leave
            where = ""
        self.errors.append(TaskError(socket.gethostname(), str(rank), what + where))

    def request_stop(self, number: int) -> None:
        """Ask every rank to save and leave; one that is starting up finds the request when it is ready."""
        record_stop_signal(self.reports, number)
        for pid in read_worker_pids(self.reports):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End every rank."""
        for process in self._ranks:
            if process.poll() is None:
                process.kill()

    def _clean(self) -> None:
        if self._watchdog.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._watchdog.wait(2.0)  # it sees that the ranks are gone
            self._watchdog.kill()
            self._watchdog.wait()
        shutil.rmtree(self._beats, ignore_errors=True)


class LocalRun(Supervisor):
    """Supervises a training run on this machine.

    Args:
        argv: command line of each rank, without the program.
        submission: what is run.
        directory: of the run.
        environment: variables of all ranks.
        port: rendezvous port; None: a free one.
        starter: starts the processes.
    """

    def __init__(
        self,
        argv: Sequence[str],
        submission: Submission,
        directory: LaunchDirectory,
        environment: dict[str, str],
        port: int | None,
        starter: Starter,
    ) -> None:
        directory.path.mkdir(parents=True, exist_ok=True)
        super().__init__(directory, submission, f"local-{os.getpid()}", 0, [socket.gethostname()])
        self._argv, self._environment, self._port = list(argv), environment, port
        self._starter = starter
        self._ranks: LocalRanks | None = None

    def begin(self) -> int | None:
        self.close_lost_attempt()
        write_submission(self.directory, self.submission)
        self.history.submitted()
        return None

    def start_ranks(self) -> LocalRanks:
        number = len(self.history.attempts)
        variables = {**self._environment, LAUNCH_TIME_VARIABLE: str(time.time())}
        if number > 1 and self.history.is_first_attempt is False:
            self.say(f"attempt {number}, from step {self.step()}")
        self._ranks = LocalRanks(
            self._argv, self.submission.world_size, self.directory.reports, variables, self._starter, self._port
        )
        return self._ranks

    def leave(self, code: int) -> int:
        return 128 + self.stop_signal if self.stop_signal else code

    def finished(self) -> int:
        return 0

    def say(self, text: str) -> None:
        if not text.startswith("the ranks have stopped"):  # rank 0 has said so
            with contextlib.suppress(OSError):
                print(text, file=sys.stderr, flush=True)

    def command_to_go_on(self) -> str:
        return f"hope {' '.join(self._argv)}"

    def failed(self, cause: Cause, failure: Failure | None) -> None:
        if failure is not None and failure.is_user_error:
            return  # give_up says it
        super().failed(cause, failure)

    def give_up(self, reason: str, code: int) -> int:
        self.history.give_up(reason)
        if code == 2:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            return code
        attempt = self.history.attempts[-1]
        newest = f"newest checkpoint: step {step}" if (step := self.step()) else "no checkpoint yet"
        text = (
            f"error: attempt {attempt.number} was the last ({newest}): {reason}\nGo on with: {self.command_to_go_on()}"
        )
        print(text, file=sys.stderr, flush=True)
        return code

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        """The first request asks the ranks to save; a second Ctrl-C ends them at once, and so does one that comes before any
        rank has come so far that there is something to save."""
        again, self.stop_signal = bool(self.stop_signal), self.stop_signal or number
        if self._ranks is None:
            return
        record_stop_signal(self.directory.reports, number)
        if (again and number == signal.SIGINT) or not read_worker_pids(self.directory.reports):
            self.ended_on_request = True
            self._ranks.kill()


def run_supervised(
    argv: Sequence[str],
    nproc: int,
    run_dir: Path,
    *,
    name: str,
    steps: int,
    max_restarts: int = 3,
    num_threads: int = 1,
    oversubscribe: bool = False,
    port: int | None = None,
    preload: Sequence[str] = (),
) -> int:
    """Train as `nproc` ranks `python -m hope_megatron ARGV` on this machine, starting them again after faults.

    Args:
        argv: command line of each rank, without the program.
        run_dir: where the history of attempts is kept, in launch/attempts.jsonl.
        name, steps: of the run.
        max_restarts: errors of the program in a row, without coming further, after which it stops; 0 restarts after nothing.
        num_threads: CPU threads of each rank for torch operators.
        oversubscribe: allow more ranks than cores (or GPUs).
        port: rendezvous port on this machine; None lets the operating system choose a free one.
        preload: modules that are imported once for all ranks and restarts, on machines without GPUs.

    Returns:
        0; 128 + the signal that ended the run early; 2 after a user's mistake; 1 when it was given up.

    Raises:
        LaunchError: too many processes for this machine, or the port is in use.
    """
    check_capacity(nproc, oversubscribe)
    if port is not None:
        _check_port_is_free(port)
    submission = Submission(
        name=name,
        steps=steps,
        nodes=1,
        ranks_per_node=nproc,
        cpus_per_process=num_threads,
        gpus_per_node=0,
        code=str(Path(__file__).resolve().parents[1]),
        python=sys.executable,
        max_restarts=max_restarts,
        max_transient_restarts=20 if max_restarts else 0,
    )
    environment = _unset(process_environment(num_threads))
    starter: Starter = Nursery(preload, environment) if preload and not count_gpus() else FreshProcesses()
    try:
        return LocalRun(argv, submission, LaunchDirectory(run_dir), environment, port, starter).run()
    finally:
        starter.close()


def run_local(argv: Sequence[str], nproc: int, *, num_threads: int = 1, oversubscribe: bool = False) -> int:
    """Run `python -m hope_megatron ARGV` as `nproc` processes that form one world, once, and wait for them.

    Returns:
        0, or the exit code of the first that failed, whose error is printed; 128 + a signal that ended it.

    Raises:
        LaunchError: too many processes for this machine.
    """
    check_capacity(nproc, oversubscribe)
    with tempfile.TemporaryDirectory(prefix="hope-launch-") as reports:
        environment = {**_unset(process_environment(num_threads)), LAUNCH_TIME_VARIABLE: str(time.time())}
        ranks = LocalRanks(argv, nproc, Path(reports), environment, FreshProcesses())
        received: list[int] = []

        def end(number: int, frame: FrameType | None) -> None:
            received.append(number)
            ranks.kill()

        previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (code := ranks.poll()) is None:
                time.sleep(0.05)
        finally:
            ranks.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if received:
            return 128 + received[0]
        if code:
            _print_failure(first_cause(read_failures(Path(reports))), ranks.errors)
        return code


def _print_failure(cause: Failure | None, errors: list[TaskError]) -> None:
    """Print the cause once. Other ranks mostly report that they lost their peer."""
    if cause is None:
        reason = str(errors[0]) if errors else "it left without a reason"
        print(f"error: a worker process died without a message ({reason}: killed, or out of memory)", file=sys.stderr)
    elif cause.is_user_error:
        print(f"error: {cause.message}", file=sys.stderr)
    else:
        print(f"{cause.message}error: rank {cause.rank} failed as shown above", file=sys.stderr)


def check_capacity(nproc: int, oversubscribe: bool) -> None:
    """Refuse more processes than this machine has cores or GPUs for.

    Raises:
        LaunchError: saying how many there may be.
    """
    if nproc < 1:
        raise LaunchError(f"--nproc {nproc}: a run needs at least one process")
    if oversubscribe:
        return
    gpus = count_gpus()
    capacity, what = (gpus, "GPUs") if gpus else (available_cpus(), "CPU cores")
    if nproc > capacity:
        raise LaunchError(
            f"--nproc {nproc}: this machine has {capacity} {what} for it; use --nproc {capacity} or fewer, "
            "or --oversubscribe to run more processes than that, slowly"
        )


def _check_port_is_free(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise LaunchError(
                f"--port {port} cannot be used ({error.strerror}); leave --port out, and the system chooses a free one"
            ) from None


def _memory_directory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _unset(variables: dict[str, str]) -> dict[str, str]:
    """Those that the user has not set."""
    return {name: value for name, value in variables.items() if name not in os.environ}
