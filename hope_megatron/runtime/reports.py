"""What the workers of a launch tell the process that started them: that they are ready, and why they ended."""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from hope_megatron.runtime.files import write_text

LAUNCH_DIR_VARIABLE = "HOPE_LAUNCH_DIR"
"""Directory through which the workers of a local launch report their process ids and failures to the launcher."""

_STOP_FILE = "stop-signal"


@dataclass(frozen=True)
class Failure:
    """Why one worker ended: what it wrote for the launcher before it exited."""

    rank: int
    time: float
    is_user_error: bool
    message: str


def report_ready(rank: int) -> int:
    """Tell the launcher that this worker handles signals itself from now on.

    Returns:
        The stop signal that came before, for which no worker was ready; 0 if none did.
    """
    directory = os.environ.get(LAUNCH_DIR_VARIABLE)
    if not directory:
        return 0
    write_text(Path(directory) / f"worker-{rank}.pid", str(os.getpid()))
    early = Path(directory) / _STOP_FILE  # looked at after the line above, and written before the launcher looks for it
    return int(early.read_text()) if early.exists() else 0


def record_stop_signal(directory: Path, number: int) -> None:
    """Leave a stop signal to the workers that are not ready for it yet."""
    write_text(directory / _STOP_FILE, str(number))


def report_failure(rank: int, error: BaseException) -> bool:
    """Leave the reason of this worker's end to the launcher, which prints one for all workers.

    Returns:
        False if there is no launcher to report to; the caller then prints the error itself.
    """
    directory = os.environ.get(LAUNCH_DIR_VARIABLE)
    if not directory:
        return False
    user_error = bool(getattr(error, "is_user_error", False))
    message = str(error) if user_error else "".join(traceback.format_exception(type(error), error, error.__traceback__))
    write_text(Path(directory) / f"failure-{rank}.txt", f"{time.time()}\n{int(user_error)}\n{message}")
    return True


def read_worker_pids(directory: Path) -> list[int]:
    """Process ids of the workers that handle signals themselves."""
    return [int(path.read_text()) for path in sorted(directory.glob("worker-*.pid"))]


def read_failures(directory: Path) -> list[Failure]:
    """What the workers reported, earliest first: the first failure is the cause, later ones mostly lost their peer."""
    failures = []
    for path in directory.glob("failure-*.txt"):
        when, user_error, message = path.read_text().split("\n", 2)
        failures.append(Failure(int(path.stem.split("-")[1]), float(when), user_error == "1", message))
    return sorted(failures, key=lambda failure: failure.time)
