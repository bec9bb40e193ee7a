"""MLflow, fed from metrics.jsonl by a thread of its own.

A tracking server may be slow, or dead, and its client blocks for minutes: training never waits for it. The thread reads
new records from metrics.jsonl, sends them, and notes how far it came in the run directory (tracking.json). What a dead
server missed is sent when it answers again, or when the run is resumed; each record once.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hope_megatron.config.run import RunConfig
from hope_megatron.runtime.files import write_json
from hope_megatron.training.metrics import read_metrics_from
from hope_megatron.training.mlflow_client import connect, default_uri, open_experiment
from hope_megatron.training.run_directory import RunDirectory

log = logging.getLogger(__name__)

_BATCH = 100
"""Parameters per request; MLflow's limit."""
_METRICS_BATCH = 1000
"""Metrics per request; MLflow's limit, which the memories of a deep model exceed."""
_MAX_PARAM_CHARS = 6000
_RETRY_S = (5.0, 15.0, 60.0, 300.0)


class TrackingError(Exception):
    """Metrics that MLflow cannot be given."""

    is_user_error = True


class Tracker:
    """Feeds one MLflow run. Rank 0 only; every method returns at once, except `close`, which has a time limit."""

    def __init__(self, config: RunConfig, directory: RunDirectory, tags: Mapping[str, str]) -> None:
        self.uri = config.tracking.uri or default_uri(config.output_dir)
        self._config = config
        self._directory = directory
        self._tags = dict(tags)
        self._wake = threading.Event()
        self._closing: tuple[str, list[Path]] | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """There is a new record in metrics.jsonl."""
        self._wake.set()

    def close(self, status: str, artifacts: Iterable[Path] = (), timeout_s: float = 30.0) -> bool:
        """Send what is left and end the MLflow run.

        Args:
            status: FINISHED, FAILED or KILLED (MLflow's words).
            artifacts: files to store with the run.
            timeout_s: how long to wait for the server.

        Returns:
            Whether everything was sent in time. If not, metrics.jsonl has it, and a resumed run sends it.
        """
        self._closing = (status, list(artifacts))
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive() or self._closing is not None:
            log.warning("MLflow at %s did not take everything in %.0f s; metrics.jsonl has it all", self.uri, timeout_s)
            return False
        return True

    # -- everything below runs on the thread ---------------------------------------------------------------------

    def _work(self) -> None:
        failures = 0
        session: _Session | None = None
        while True:
            try:
                if session is None:
                    session = _Session(self.uri, self._config, self._directory, self._tags)
                closing = self._closing
                session.send_new_records()
                if closing is not None:
                    session.finish(*closing)
                    self._closing = None
                    return
                failures = 0
            except Exception as error:
                if self._closing is not None:
                    return
                if failures == 0:
                    log.warning(
                        "MLflow at %s does not answer (%s); training goes on and tries again", self.uri, _brief(error)
                    )
                self._wait_for_close(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
                failures += 1
                continue
            self._wake.wait()
            self._wake.clear()

    def _wait_for_close(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._closing is None and time.monotonic() < deadline:
            self._wake.wait(0.5)
            self._wake.clear()
            time.sleep(0.1)


class _Session:
    """A connection to a server with one run in it."""

    def __init__(self, uri: str, config: RunConfig, directory: RunDirectory, tags: Mapping[str, str]) -> None:
        self._client, experiment_id = open_experiment(uri, config.tracking.experiment)
        import mlflow.entities

        self._entities = mlflow.entities
        self._directory = directory
        self._offset = 0
        saved = read_tracking(directory)
        self._known = saved if saved.get("uri") == uri else {"uri": uri}
        if "run_id" in self._known:
            self._client.update_run(self._known["run_id"], status="RUNNING")
        else:
            run = self._client.create_run(experiment_id, tags={**config.tracking.tags, **tags}, run_name=config.name)
            self._known |= {"run_id": run.info.run_id, "experiment_id": experiment_id, "sent_step": -1}
            self._save()
            self._log_params(config)

    @property
    def run_id(self) -> str:
        return self._known["run_id"]

    def send_new_records(self) -> None:
        """Send the records later than the last one sent."""
        records, self._offset = read_metrics_from(self._directory.metrics, self._offset)
        for record in records:
            if record["step"] <= self._known["sent_step"]:
                continue
            timestamp = int(1000 * record.get("time/unix_s", time.time()))
            metrics = [
                self._entities.Metric(name, float(value), timestamp, record["step"])
                for name, value in record.items()
                if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
            ]
            for first in range(0, len(metrics), _METRICS_BATCH):
                self._client.log_batch(self.run_id, metrics=metrics[first : first + _METRICS_BATCH])
            self._known["sent_step"] = record["step"]
            self._save()

    def finish(self, status: str, artifacts: Iterable[Path]) -> None:
        """Store artifacts and end the run."""
        for path in artifacts:
            if path.is_file():
                self._client.log_artifact(self.run_id, str(path))
        self._client.set_terminated(self.run_id, status)

    def _log_params(self, config: RunConfig) -> None:
        flat = _flatten(config.model_dump(mode="json"))
        params = [self._entities.Param(name, value[:_MAX_PARAM_CHARS]) for name, value in flat.items()]
        for first in range(0, len(params), _BATCH):
            self._client.log_batch(self.run_id, params=params[first : first + _BATCH])

    def _save(self) -> None:
        write_json(self._directory.tracking, self._known)


def log_evaluation(directory: RunDirectory, step: int, metrics: Mapping[str, float]) -> str:
    """Add metrics of an evaluation to the MLflow run of a training run, and return that run's id.

    Raises:
        TrackingError: the run was not tracked, or the server does not take the metrics.
    """
    known = read_tracking(directory)
    if "run_id" not in known:
        raise TrackingError(f"{directory.path} was trained without MLflow (no tracking.json); leave --mlflow out")
    import mlflow.entities
    from mlflow.exceptions import MlflowException

    now = int(1000 * time.time())
    entries = [mlflow.entities.Metric(k, float(v), now, step) for k, v in metrics.items() if math.isfinite(v)]
    try:
        connect(known["uri"]).log_batch(known["run_id"], metrics=entries)
    except MlflowException as error:
        raise TrackingError(f"MLflow at {known['uri']} did not take the metrics: {_brief(error)}") from error
    return known["run_id"]


def read_tracking(directory: RunDirectory) -> dict[str, Any]:
    """What tracking.json says: uri, run_id, sent_step. Empty if there is none."""
    try:
        found = json.loads(directory.tracking.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys and text values."""
    if not isinstance(tree, Mapping):
        return {prefix: tree if isinstance(tree, str) else json.dumps(tree)}
    flat: dict[str, str] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def _brief(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
