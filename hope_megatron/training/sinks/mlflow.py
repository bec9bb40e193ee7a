"""MLflow: params, metrics and files of one run, by MlflowClient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from hope_megatron.config.run import RunConfig
from hope_megatron.config.secrets import mask_credentials
from hope_megatron.training import mlflow_client
from hope_megatron.training.sinks.base import Opening, Sink, flatten

_BATCH = 100
"""Parameters per request; MLflow's limit."""
_METRICS_BATCH = 1000
"""Metrics per request; MLflow's limit, which the memories of a deep model exceed."""
_MAX_PARAM_CHARS = 6000


class MLflow(Sink):
    """A connection to a server with one run in it. Another server than before means another run."""

    title = "MLflow"

    def __init__(self, opening: Opening) -> None:
        config, state = opening.config, opening.state
        uri = mlflow_client.tracking_uri(config)
        shown = mask_credentials(uri)
        if state.get("uri") != shown:
            state.clear()
        self._client, experiment_id = mlflow_client.open_experiment(uri, mlflow_client.experiment_name(config))
        import mlflow.entities

        self._entities = mlflow.entities
        if "run_id" in state:
            self.run_id = state["run_id"]
            self._client.update_run(self.run_id, status="RUNNING")
            for name, value in opening.tags.items():
                self._client.set_tag(self.run_id, name, value)
            return
        tags = {**config.tracking.tags, **opening.tags}
        self.run_id = self._client.create_run(experiment_id, tags=tags, run_name=config.name).info.run_id
        state |= {"uri": shown, "run_id": self.run_id, "experiment_id": experiment_id, "sent_step": -1}
        self._log_params(config)

    def send(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        timestamp = int(1000 * time_s)
        entries = [self._entities.Metric(name, value, timestamp, step) for name, value in metrics.items()]
        for first in range(0, len(entries), _METRICS_BATCH):
            self._client.log_batch(self.run_id, metrics=entries[first : first + _METRICS_BATCH])

    def finish(self, status: str, artifacts: Iterable[Path]) -> None:
        for path in artifacts:
            if path.is_file():
                self._client.log_artifact(self.run_id, str(path))
        self._client.set_terminated(self.run_id, status)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        mlflow_client.check_mlflow(config)

    @classmethod
    def where(cls, config: RunConfig) -> str:
        return mask_credentials(mlflow_client.configured_uri(config))

    @classmethod
    def is_lasting(cls, error: Exception) -> bool:
        return mlflow_client.is_lasting(error)

    def _log_params(self, config: RunConfig) -> None:
        flat = flatten(config.model_dump(mode="json"))
        params = [self._entities.Param(name, value[:_MAX_PARAM_CHARS]) for name, value in flat.items()]
        for first in range(0, len(params), _BATCH):
            self._client.log_batch(self.run_id, params=params[first : first + _BATCH])
