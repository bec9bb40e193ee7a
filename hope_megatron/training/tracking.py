"""Trackers, fed from metrics.jsonl by a thread each.

A tracking server may be slow, or dead, and its client blocks for minutes: training never waits for it, and no tracker for another.
A thread reads new records from metrics.jsonl, sends them, and notes how far it came in the run directory. What a dead server
missed is sent when it answers again, or when the run is resumed; each record once.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hope_megatron.config.run import RunConfig
from hope_megatron.config.secrets import is_masked, unmask_tracking_uri
from hope_megatron.config.trackers import TRACKERS
from hope_megatron.runtime.files import write_json
from hope_megatron.runtime.records import read_object
from hope_megatron.training.metrics import read_metrics_from
from hope_megatron.training.mlflow_client import connect
from hope_megatron.training.run_directory import RunDirectory
from hope_megatron.training.sinks.base import Opening, Sink, TrackingError, brief, finite_numbers

log = logging.getLogger(__name__)

_RETRY_S = (5.0, 15.0, 60.0, 300.0)


def check_tracking(config: RunConfig) -> None:
    """Find the mistakes in a run's tracking before it trains. A server that does not answer is none: it may come back.

    Raises:
        TrackingError: saying what is wrong and what to do.
    """
    for name in config.tracking.names:
        TRACKERS.open(name).check(config)


class Trackers:
    """All trackers of a run. Rank 0 only; every method returns at once, except `close`, which has a time limit."""

    def __init__(self, config: RunConfig, directory: RunDirectory, tags: Mapping[str, str]) -> None:
        self._trackers = [Tracker(config, directory, tags, name) for name in config.tracking.names]

    def notify(self) -> None:
        """There is a new record in metrics.jsonl."""
        for tracker in self._trackers:
            tracker.notify()

    def close(self, status: str, artifacts: Iterable[Path] = (), timeout_s: float = 30.0) -> bool:
        """Send what is left and end the run in every tracker; the time limit is one for all. See Tracker.close."""
        artifacts, deadline = list(artifacts), time.monotonic() + timeout_s
        for tracker in self._trackers:
            tracker.begin_closing(status, artifacts)
        taken = [tracker.wait_closed(max(0.0, deadline - time.monotonic())) for tracker in self._trackers]
        return all(taken)


class Tracker:
    """Feeds one tracker from a thread."""

    def __init__(
        self, config: RunConfig, directory: RunDirectory, tags: Mapping[str, str], name: str = "mlflow"
    ) -> None:
        self._kind: type[Sink] = TRACKERS.open(name)
        self._title = f"{self._kind.title} at {self._kind.where(config)}"
        self._config = config
        self._directory = directory
        self._file = directory.tracking_of(name)
        self._tags = dict(tags)
        self._state = _read_state(self._file)
        self._offset = 0
        self._wake = threading.Event()
        self._closing: tuple[str, list[Path]] | None = None
        self._problem = ""
        self._refused = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """There is a new record in metrics.jsonl."""
        self._wake.set()

    def close(self, status: str, artifacts: Iterable[Path] = (), timeout_s: float = 30.0) -> bool:
        """Send what is left and end the run in the tracker.

        Args:
            status: FINISHED, FAILED or KILLED (MLflow's words).
            artifacts: files to store with the run.
            timeout_s: how long to wait for the server.

        Returns:
            Whether everything was sent in time. If not, metrics.jsonl has it, and a resumed run sends it.
        """
        self.begin_closing(status, artifacts)
        return self.wait_closed(timeout_s)

    def begin_closing(self, status: str, artifacts: Iterable[Path]) -> None:
        """Ask the thread to end; returns at once."""
        self._closing = (status, list(artifacts))
        self._wake.set()

    def wait_closed(self, timeout_s: float) -> bool:
        """Wait for the thread, and say what it could not do."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("%s did not take everything in %.0f s; metrics.jsonl has it all", self._title, timeout_s)
        elif self._closing is not None and not self._refused:
            log.warning("%s did not take everything (%s); metrics.jsonl has it all", self._title, self._problem)
        return not self._thread.is_alive() and self._closing is None

    # -- everything below runs on the thread ---------------------------------------------------------------------

    def _work(self) -> None:
        failures = 0
        sink: Sink | None = None
        while True:
            try:
                if sink is None:
                    sink = self._open()
                closing = self._closing
                self._send_new_records(sink)
                if closing is not None:
                    sink.finish(*closing)
                    self._closing = None
                    return
                failures = 0
            except Exception as error:
                if self._is_over(error, failures):
                    return
                self._wait_for_close(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
                failures += 1
                continue
            self._wake.wait()
            self._wake.clear()

    def _open(self) -> Sink:
        self._offset = 0
        sink = self._kind(Opening(self._config, self._directory, self._tags, self._state))
        self._save()
        return sink

    def _send_new_records(self, sink: Sink) -> None:
        """Send the records later than the last one sent."""
        records, self._offset = read_metrics_from(self._directory.metrics, self._offset)
        for record in records:
            if record["step"] <= self._state.get("sent_step", -1):
                continue
            sink.send(record["step"], record.get("time/unix_s", time.time()), finite_numbers(record))
            self._state["sent_step"] = record["step"]
            self._save()

    def _is_over(self, error: Exception, failures: int) -> bool:
        """Say what went wrong, once; whether there is no sense in trying again."""
        self._problem = brief(error)
        if self._kind.is_lasting(error):
            self._refused = True
            log.error(
                "%s does not take this run: %s. Training goes on without it; metrics.jsonl has everything, and once this is put "
                "right, a resume sends it",
                self._title,
                self._problem,
            )
            return True
        if self._closing is not None:
            return True
        if failures == 0:
            log.warning("%s does not answer (%s); training goes on and tries again", self._title, self._problem)
        return False

    def _wait_for_close(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._closing is None and time.monotonic() < deadline:
            self._wake.wait(0.5)
            self._wake.clear()
            time.sleep(0.1)

    def _save(self) -> None:
        write_json(self._file, self._state)


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
    uri = unmask_tracking_uri(known["uri"])
    if is_masked(uri):
        raise TrackingError(
            f"the user part of {uri} is not kept with the run; set MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    try:
        connect(uri).log_batch(known["run_id"], metrics=entries)
    except MlflowException as error:
        raise TrackingError(f"MLflow at {known['uri']} did not take the metrics: {brief(error)}") from error
    return known["run_id"]


def read_tracking(directory: RunDirectory) -> dict[str, Any]:
    """What tracking.json says of MLflow: uri, run_id, sent_step. Empty if there is none."""
    found = read_object(directory.tracking) or {}
    whole = isinstance(found.get("run_id"), str) and isinstance(found.get("sent_step"), int)
    return found if whole and isinstance(found.get("uri"), str) else {}


def _read_state(file: Path) -> dict[str, Any]:
    """What a sink kept; empty where it is damaged, as at a first start."""
    found = read_object(file) or {}
    return found if isinstance(found.get("sent_step", -1), int) and isinstance(found.get("run_id", ""), str) else {}
