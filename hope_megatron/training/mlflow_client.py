"""Opening MLflow: patience with servers, and SQLite databases that many processes open at once."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hope_megatron.config.run import RunConfig
from hope_megatron.config.secrets import is_masked, mask_credentials
from hope_megatron.training.sinks.base import Sink, TrackingError, brief

_LOCK_TIMEOUT_S = 120.0
_CHECK_TIMEOUT_S = 10.0
_STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
"""Kinds of tracking URIs that MLflow 3 takes."""
_LASTING_CODES = {
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "FEATURE_DISABLED",
    "INVALID_PARAMETER_VALUE",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}
"""MLflow's error codes for what trying again does not mend."""
_SETTINGS = {"DISABLE_TELEMETRY": "true", "HTTP_REQUEST_TIMEOUT": "10", "HTTP_REQUEST_MAX_RETRIES": "1"}


def tracking_uri(config: RunConfig) -> str:
    """Where a run is tracked.

    Raises:
        TrackingError: MLflow takes no such URI, or its user part was masked when the configuration was written.
    """
    uri = configured_uri(config)
    if is_masked(uri):
        raise TrackingError(
            f"tracking.uri={uri} was masked when the configuration was written. Give tracking.uri again, set MLFLOW_TRACKING_URI "
            "to it, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    scheme = re.match(r"([\w.-]+)(\+\w+)?://", uri) or re.fullmatch("(databricks)", uri)
    if scheme is None or scheme[1] == "file":
        raise TrackingError(
            f"tracking.uri={mask_credentials(uri)}: MLflow keeps no runs in a plain directory; give a database, for example "
            "sqlite:////home/me/mlflow.db, the http(s) address of a server, or leave it out"
        )
    if scheme[1] not in _STORES:
        raise TrackingError(
            f"tracking.uri={mask_credentials(uri)}: MLflow has no store for {scheme[1]}://; it has {', '.join(_STORES)}"
        )
    return uri


def configured_uri(config: RunConfig) -> str:
    """tracking.uri, MLFLOW_TRACKING_URI, or a SQLite file beside the run directories."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(config.output_dir)


def experiment_name(config: RunConfig) -> str:
    """tracking.experiment, MLFLOW_EXPERIMENT_NAME, or `hope`."""
    return config.tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "hope"


def check_mlflow(config: RunConfig) -> None:
    """Find the mistakes in a run's MLflow settings. A server that does not answer is none: it may come back.

    Raises:
        TrackingError: saying what is wrong and what to do.
    """
    uri, experiment = tracking_uri(config), experiment_name(config)
    database = sqlite_file(uri)
    if database is not None:
        _check_sqlite(uri, database, experiment)
        return
    errors: list[Exception] = []

    def ask() -> None:
        try:
            _find_experiment(connect(uri), experiment)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, name="mlflow-check", daemon=True)
    thread.start()
    thread.join(_CHECK_TIMEOUT_S)
    for error in errors:
        if is_lasting(error):
            raise TrackingError(f"MLflow at {mask_credentials(uri)}: {brief(error)}") from error


def is_lasting(error: Exception) -> bool:
    """Whether trying again would fail the same way: a mistake of the user, not a server that is away."""
    if isinstance(error, (TrackingError, ImportError, OSError)):
        return Sink.is_lasting(error)
    return getattr(error, "error_code", None) in _LASTING_CODES or "file is not a database" in str(error)


def _check_sqlite(uri: str, database: Path, experiment: str) -> None:
    """The same for a file, without the seconds that importing MLflow takes."""
    if not database.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            query = "select experiment_id, lifecycle_stage from experiments where name = ?"
            found = connection.execute(query, (experiment,)).fetchone()
    except sqlite3.DatabaseError as error:
        if "not a database" in str(error):
            raise TrackingError(f"tracking.uri={uri}: {database} is no SQLite database; give another file") from None
        return  # locked, or without MLflow's tables: MLflow itself makes or migrates them
    if found is not None:
        _require_active(experiment, *found)


def _require_active(experiment: str, experiment_id: Any, stage: str) -> None:
    if stage != "active":
        raise TrackingError(
            f"experiment {experiment!r} is {stage} in MLflow; bring it back with `mlflow experiments restore --experiment-id "
            f"{experiment_id}`, or set tracking.experiment to another name"
        )


def _find_experiment(client: Any, experiment: str) -> str | None:
    """Id of an experiment that takes runs; None if there is none of that name."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    _require_active(experiment, found.experiment_id, found.lifecycle_stage)
    return str(found.experiment_id)


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
        TrackingError: the experiment has been deleted.
        any of the ways in which a server fails; TimeoutError if another process keeps the database's lock.
    """
    database = sqlite_file(uri)
    with _one_at_a_time(database):
        client = connect(uri)
        found = _find_experiment(client, experiment)
        if found is not None:
            return client, found
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
    with open(database.with_name(f"{database.name}.lock"), "ab") as lock:  # closing it, or dying, gives the lock back
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
