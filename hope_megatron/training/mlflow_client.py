"""Opening MLflow: patience with servers, and SQLite databases that many processes open at once."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LOCK_TIMEOUT_S = 120.0
_SETTINGS = {"DISABLE_TELEMETRY": "true", "HTTP_REQUEST_TIMEOUT": "10", "HTTP_REQUEST_MAX_RETRIES": "1"}


def default_uri(output_dir: Path) -> str:
    """SQLite beside the run directories."""
    return f"sqlite:///{Path(output_dir).absolute() / 'mlflow.db'}"


def connect(uri: str) -> Any:
    """An MlflowClient that gives up on a dead server soon, and is silent."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(f"MLFLOW_{name}", value)
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):  # after the import, which sets levels of its own
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri)


def open_experiment(uri: str, experiment: str) -> tuple[Any, str]:
    """Connect, and find or create an experiment.

    Args:
        uri: tracking server, or SQLite file, which is created and migrated where need be.
        experiment: its name.

    Returns:
        (MlflowClient, experiment id)

    Raises:
        any of the ways in which a server fails; TimeoutError if another process keeps the database's lock.
    """
    database = sqlite_file(uri)
    with _one_at_a_time(database):
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, found.experiment_id
        # Beside a SQLite file MLflow would put artifacts into whatever directory the process happens to be in.
        location = None if database is None else (database.parent / "mlartifacts" / experiment).as_uri()
        return client, client.create_experiment(experiment, artifact_location=location)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite URI; None for servers."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None


@contextmanager
def _one_at_a_time(database: Path | None) -> Iterator[None]:
    """Hold the database's lock: processes that find it missing, or of an older version, would all make its tables at once."""
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(database.with_name(f"{database.name}.lock"), "a") as lock:  # closing it, or dying, gives the lock back
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while not _try_lock(lock.fileno()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has held {lock.name} for {_LOCK_TIMEOUT_S:.0f} s")
            time.sleep(0.1)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
