"""What the workers of a launch tell the process that started them: that they are ready. Why they ended is in failures.py."""

from __future__ import annotations

import os
from pathlib import Path

from hope_megatron.runtime.failures import LAUNCH_DIR_VARIABLE
from hope_megatron.runtime.files import write_text

_STOP_FILE = "stop-signal"


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
    return _number(early) or 0


def record_stop_signal(directory: Path, number: int) -> None:
    """Leave a stop signal to the workers that are not ready for it yet."""
    write_text(directory / _STOP_FILE, str(number))


def read_worker_pids(directory: Path) -> list[int]:
    """Process ids of the workers that handle signals themselves."""
    return [pid for path in sorted(directory.glob("worker-*.pid")) if (pid := _number(path)) is not None]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
