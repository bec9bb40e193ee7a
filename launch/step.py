"""One srun inside a job: start it, pass on a request to stop, end it, and learn which task failed. Standard library only."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.errors import LaunchError
from launch.submission import Submission

_TASK_ERROR = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): (?P<what>.+)")


class TaskError(NamedTuple):
    """What is known of a rank that ended badly: from srun, or from the process."""

    node: str
    tasks: str
    what: str
    """`Exited with exit code 1`, `Killed`, `Killed in step 7, phase forward`, `Segmentation fault`, ..."""

    @property
    def by_signal(self) -> bool:
        """Whether a signal ended it, as opposed to an exit code of its own."""
        return not self.what.startswith("Exited with")

    def __str__(self) -> str:
        often = " (the system does that when memory runs out)" if self.what.startswith("Killed") else ""
        return f"rank {self.tasks} on {self.node}: {self.what}{often}"


def srun_command(submission: Submission, nodes: Sequence[str], *, tasks_per_node: int) -> list[str]:
    """srun with the options of a run, for `tasks_per_node` tasks on each of `nodes`."""
    command = [
        "srun",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes) * tasks_per_node}",
        f"--nodelist={','.join(nodes)}",
    ]
    command += [f"--ntasks-per-node={tasks_per_node}", "--distribution=block", "--export=ALL", "--overlap"]
    # srun does not take the batch script's cpus-per-task over (since Slurm 22.05).
    command += [f"--cpus-per-task={submission.cpus_per_process}", *submission.srun_options]
    return command


class Step:
    """A running srun. Its output goes where this process writes; the first errors of tasks are kept."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], cwd: Path) -> None:
        self.errors: list[TaskError] = []
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            list(command),
            env={**os.environ, **environment},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # Until srun handles signals itself, a request to stop must not kill it.
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
        )
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(timeout=10)
        return code

    def request_stop(self, number: int = signal.SIGUSR1) -> None:
        """SIGUSR1 to every task, whatever signal asked for it: srun itself would end by others."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)

    def end(self) -> None:
        """End every task: srun terminates them when it is terminated; kill it when it hangs."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End srun itself, without a word to the tasks; Slurm ends those when it notices."""
        self._process.kill()
        self._process.wait()

    def wait(self, timeout_s: float, interrupted: Callable[[], bool]) -> int | None:
        """Exit code; None if it was ended, at the time limit or because of an interruption."""
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline or interrupted():
                self.end()
                return None
            time.sleep(0.1)
        return code

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            if match := _TASK_ERROR.match(line):
                self.errors.append(TaskError(**match.groupdict()))


_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_QUIET_PORTS = 10_000


def _quiet_ports() -> tuple[int, int]:
    """Ports below those that the system gives to connections: between our look and the rendezvous nobody is given one of them.
    (0, 0), the system's choice, where there are none."""
    try:
        low = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0, 0
    return (low - _QUIET_PORTS, low - 1) if low - _QUIET_PORTS >= 1024 else (0, 0)


def free_port(allowed: Sequence[int] | None, job_id: int, address: str = "") -> int:
    """A free port of this node for a rendezvous.

    Args:
        allowed: first and last port to choose from; None takes one that the system gives to nobody by itself.
        job_id: decides where in the range to begin, so that jobs that start side by side do not pick the same port.
        address: of the interface; empty means all of them.

    Raises:
        LaunchError: if all ports of the range are taken.
    """
    first, last = allowed or _quiet_ports()
    count = last - first + 1
    for i in range(count):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, first + (job_id + i) % count if first else 0))
                return int(probe.getsockname()[1])
            except OSError:
                continue
    raise LaunchError(f"no port of master_ports=[{first}, {last}] is free on {socket.gethostname()}; widen the range")
