"""The directory of a run: who may write it, and what lies where."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from hope_megatron.training.metrics import METRICS_FILE


class RunDirectoryError(Exception):
    """The run directory is in use, holds another run, or cannot be written."""

    is_user_error = True


class RunDirectory:
    """Paths of a run, and the lock that keeps a second job out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.history = path / "history.json"
        self.metrics = path / METRICS_FILE
        self.data_ledger = path / "data_ledger.jsonl"
        self.ledger = path / "ledger.jsonl"
        self.log = path / "train.log"
        self.checkpoints = path / "checkpoints"
        self.curves = path / "curves.png"
        self.summary = path / "summary.json"
        self.start_up = path / "start_up.json"
        self.tracking = path / "tracking.json"
        self._lock: int | None = None

    def tracking_of(self, name: str) -> Path:
        """What a tracker keeps of its run. MLflow's has the name that it had before there were others."""
        return self.tracking if name == "mlflow" else self.path / f"tracking-{name}.json"

    def acquire(self) -> None:
        """Create the directory and take its lock, which the kernel takes back when this process ends, however it ends.

        Raises:
            RunDirectoryError: if it cannot be created, or another process holds the lock.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write the run directory {self.path}: {error.strerror}; choose another output_dir or name"
            ) from None
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = self._read_holder()
            self.release()
            raise RunDirectoryError(
                f"{self.path} is in use by {holder}; wait for that run or stop it, or give this one another name"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read_holder(self) -> str:
        assert self._lock is not None
        try:
            holder: dict[str, Any] = json.loads(os.pread(self._lock, 4096, 0))
            return f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
