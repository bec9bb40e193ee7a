"""Processes that open a tracking database at once: one of them makes it."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import mlflow.tracking  # noqa: F401  before the processes fork, which would otherwise import it one by one
import pytest

from hope_megatron.training import mlflow_client
from hope_megatron.training.mlflow_client import default_uri, open_experiment

NUM_PROCESSES = 4


def _open(directory: Path, start, results) -> None:
    start.wait()
    try:
        client, experiment_id = open_experiment(default_uri(directory), "together")
        client.create_run(experiment_id)
        results.put(experiment_id)
    except Exception as error:
        results.put(repr(error)[:300])


def test_a_database_is_made_once_by_processes_that_start_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(NUM_PROCESSES), context.Queue()
    directory = tmp_path / "new"
    processes = [context.Process(target=_open, args=(directory, start, results)) for _ in range(NUM_PROCESSES)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(10)
    assert set(found) == {"1"}, found
    client, experiment_id = open_experiment(default_uri(directory), "together")
    assert len(client.search_runs([experiment_id])) == NUM_PROCESSES
    assert client.get_experiment(experiment_id).artifact_location == (directory / "mlartifacts/together").as_uri()


def test_a_lock_that_is_kept_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(mlflow_client, "_LOCK_TIMEOUT_S", 0.2)
    with open(tmp_path / "mlflow.db.lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match=r"mlflow\.db\.lock"):
            open_experiment(default_uri(tmp_path), "hope")
