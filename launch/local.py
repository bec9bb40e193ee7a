"""Training processes on this machine, started through torchrun's elastic agent in this very process.

Signals stay in one hand: workers live in sessions of their own, so Ctrl-C reaches only this process, which passes it
on once. The workers then agree on a last step, save and leave by themselves; a second Ctrl-C ends them at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from hope_megatron.runtime.process import LAUNCH_TIME_VARIABLE, available_cpus, count_gpus, process_environment
from hope_megatron.runtime.reports import LAUNCH_DIR_VARIABLE, read_failures, read_worker_pids, record_stop_signal
from launch.errors import LaunchError

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run_local(
    argv: Sequence[str],
    nproc: int,
    *,
    num_threads: int = 1,
    oversubscribe: bool = False,
    port: int | None = None,
    after_failure: Callable[[], str] = str,
) -> int:
    """Run `python -m hope_megatron ARGV` as `nproc` processes that form one world, and wait for them.

    Args:
        argv: command line of each worker, without the program.
        nproc: number of processes.
        num_threads: CPU threads of each process for torch operators.
        oversubscribe: allow more processes than cores (or GPUs).
        port: rendezvous port on this machine; None lets the operating system choose a free one.
        after_failure: what to tell the user besides when a worker was killed: how far it was, how to go on.

    Returns:
        Exit code: 0, that of the worker that failed first, or 128 + the signal that ended the run early.

    Raises:
        LaunchError: too many processes for this machine, or the port is in use.
    """
    _check_capacity(nproc, oversubscribe)
    if port is not None:
        _check_port_is_free(port)
    with tempfile.TemporaryDirectory(prefix="hope-launch-") as directory:
        environment = process_environment(num_threads) | {
            LAUNCH_DIR_VARIABLE: directory,
            LAUNCH_TIME_VARIABLE: str(time.time()),
        }
        died: _Death | None = None
        with _environment(environment), _SignalForwarding(Path(directory)) as signals:
            try:
                died = _run_agent(list(argv), nproc, port)
            except (KeyboardInterrupt, _Interrupted):
                return 130 if signals.received is None else 128 + signals.received
        if signals.received is not None:
            return 128 + signals.received
        if died is None:
            return 0
        _print_failure(Path(directory), died, after_failure)
        return died.exit_code


def _check_capacity(nproc: int, oversubscribe: bool) -> None:
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
                f"--port {port} cannot be used ({error.strerror}); leave --port away and the system chooses a free one"
            ) from None


class _Death(NamedTuple):
    """The worker that failed first."""

    rank: int
    exit_code: int
    """128 + the signal, if one ended it."""
    signal_number: int

    def __str__(self) -> str:
        if not self.signal_number:
            return f"rank {self.rank} ended with exit code {self.exit_code} and without a message"
        name = signal.Signals(self.signal_number).name
        often = "; the system does that when memory runs out" if self.signal_number == signal.SIGKILL else ""
        return f"rank {self.rank} was killed by {name}{often}"


def _run_agent(argv: list[str], nproc: int, port: int | None) -> _Death | None:
    """The first failed worker; None if all have done their work."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Workers report failures to us; the agent's own account of them would repeat it.
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    arguments = ["--nnodes=1", f"--nproc-per-node={nproc}", "--max-restarts=0", "--monitor-interval=0.1"]
    arguments += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port or 0}", "--local-addr=localhost"]
    arguments += ["--rdzv-id", f"hope-{os.getpid()}"]
    arguments += ["--signals-to-handle=SIGHUP,SIGQUIT"]  # the others are ours
    try:
        torchrun.run(torchrun.get_args_parser().parse_args([*arguments, "-m", "hope_megatron", *argv]))
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        number = max(0, -first.exitcode)
        return _Death(first.local_rank, 128 + number if number else first.exitcode, number)
    return None


def _print_failure(directory: Path, died: _Death, after_failure: Callable[[], str]) -> None:
    """Print the cause once: a worker that was killed, else the earliest report. Others mostly report that they lost their peer."""
    failures = read_failures(directory)
    if died.signal_number or not failures:
        print(f"error: {'; '.join(filter(None, (str(died), after_failure())))}", file=sys.stderr)
        return
    cause = next((failure for failure in failures if failure.is_user_error), failures[0])
    if cause.is_user_error:
        print(f"error: {cause.message}", file=sys.stderr)
    else:
        print(f"{cause.message}error: rank {cause.rank} failed as shown above", file=sys.stderr)


class _Interrupted(BaseException):
    """A signal arrived before the workers could handle one: end them. It must pass whatever torch catches."""


class _SignalForwarding:
    """Passes the first signal on to the workers, and kills them on the second."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.received: int | None = None

    def __enter__(self) -> _SignalForwarding:
        self._previous = {number: signal.signal(number, self._handle) for number in _FORWARDED}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        record_stop_signal(self.directory, number)
        workers = read_worker_pids(self.directory)
        again = self.received is not None and number == signal.SIGINT
        self.received = number
        if not workers:
            raise _Interrupted
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if again else number)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables that the user has not set, for the time of the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
